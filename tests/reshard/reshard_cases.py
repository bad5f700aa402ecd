"""Rows of the data-parallel family, and one model with what makes layouts hard, saved after 3 steps of 6."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from camshaft.distributed import Environment
from camshaft.loop import session
from camshaft.models.llama import Llama
from camshaft.plugin import Plugin, hookimpl
from camshaft.rundir import RunDirectory
from camshaft.testing.compare import Worst, compare
from camshaft.testing.ranks import run_ranks
from camshaft.testing.record import Probe, StepRecord, optimizer_state, weights
from camshaft.testing.run import Quiet

HALF, END = 3, 6
FP64 = dict.fromkeys(("weights", "optimizer", "norm", "loss", "gradients"), 1e-12) | {"lr": 1e-15}
LATE = {"adamw": 2, "sgd": 0, "lion": 2, "lamb": 2, "muon": 2}
"""Step of the first gradient of ``late`` and ``gate``: their count of steps stays behind the others'. torch's fused SGD
cannot begin with some of its parameters later."""
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"adamw": {"lr": 3e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}},
    "sgd": {"sgd": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}},
    "lion": {"lion": {"lr": 1e-3}},
    "lamb": {"lamb": {"lr": 3e-3}},
    "muon": {"muon": {"lr": 3e-3}},
}


class Mixed(Llama):
    """Tied embeddings, a frozen layer, and parameters that are used late or never, one of them without dimensions."""

    open = False

    def __init__(self, config: Any, scalar: bool) -> None:
        super().__init__(config)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("layers.1." not in name)
        self.unused = torch.nn.Parameter(torch.empty(7, 3))
        self.late = torch.nn.Parameter(torch.empty(5))
        self.gate = torch.nn.Parameter(torch.empty(() if scalar else (1,)))

    def forward(self, batch: Any) -> Any:
        loss = super().forward(batch)
        if not self.open:
            return loss
        ramp = torch.arange(1, 6, dtype=loss.dtype)
        extra = (self.late.to(loss.dtype) * ramp).sin().sum() + self.gate.to(loss.dtype).square().sum()
        return loss + (batch.labels >= 0).sum() * extra


class Variant(Plugin):
    """Owns ``build_model``, and opens the late parameters. ``scalar``: one of them has no dimensions."""

    def __init__(self, scalar: bool, late: int) -> None:
        super().__init__()
        self.scalar, self.late = scalar, late

    @hookimpl
    def build_model(self, config: Any) -> Mixed:
        return Mixed(config, self.scalar)

    @hookimpl
    def pre_forward(self, state: Any) -> None:
        state.model.open = state.step >= self.late


class AtLoad(Plugin):
    """Copies what was loaded, and what the model makes of it where that can be read."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: dict[str, Tensor] = {}
        self.optimizer: dict[str, Tensor] = {}
        self.parameters: dict[str, Tensor] = {}
        self.boxes: dict[str, tuple[slice, ...]] = {}
        """Which part of the whole each of ``parameters`` is, where axes of the model divide them."""

    @hookimpl
    def inert(self) -> None:
        """A run that loads nothing has nothing for it to do."""

    @hookimpl
    def post_load(self, state: Any) -> None:
        self.weights = weights(state.world, state.model)
        self.optimizer = optimizer_state(state.world, state.optimizer)
        if state.world.readable:
            named = state.model.named_parameters()
            self.parameters = {name: parameter.detach().clone() for name, parameter in named}
            self.boxes = {
                name: tuple(
                    slice(at, at + size) for at, size in zip(box.offset, self.parameters[name].shape, strict=True)
                )
                for name, box in state.world.boxes.items()
            }


@dataclass(frozen=True)
class Row:
    """A way to lay out one model over ``ranks``."""

    ranks: int
    plugins: Mapping[str, Any] = field(default_factory=dict)
    shard: int | None = None


def zero(ranks: int, stage: int, shard: int | None = None, **options: Any) -> Row:
    size = {"bucket_size_mb": 0.01} if stage < 3 else {}
    return Row(ranks, {"zero": {"stage": stage, **size, **options}}, shard)


def deepspeed(ranks: int, stage: int) -> Row:
    return Row(ranks, {"deepspeed": {"stage": stage, **({"reduce_bucket_size": 3000} if stage else {})}})


ROWS = {
    "plain": Row(1),
    "ddp-2": Row(2, {"ddp": {"bucket_size_mb": 0.005}}),
    "zero1-2": zero(2, 1),
    "zero2-3": zero(3, 2),
    "zero3-2": zero(2, 3),
    "zero3-4": zero(4, 3),
    "hybrid-2x2": zero(4, 3, shard=2),
    "torch-2": zero(2, 3, provider="torch"),
    **{f"deepspeed{stage}-2": deepspeed(2, stage) for stage in range(4)},
}
Make = Callable[..., Any]


@dataclass(frozen=True)
class Ran:
    """What rank 0 saw: each step, and what it began with if that was loaded."""

    records: list[StepRecord]
    loaded: AtLoad
    told: list[str]
    """Log lines of warnings."""


def run(
    make: Make, row: str, path: Path, *, optimizer: str, precision: Mapping[str, Any], scalar: bool = True, **saves: Any
) -> Ran:
    """Train the row to step ``END`` with these options of ``checkpoint``."""
    ranks, shard = ROWS[row].ranks, ROWS[row].shard
    resolved = make(
        {
            "ddp": None,
            **ROWS[row].plugins,
            **OPTIMIZERS[optimizer],
            "lr_schedule": {"type": "linear", "warmup_steps": 4, "min_lr_ratio": 0.1},
            "clip": {"max_norm": 0.1},
            "precision": dict(precision),
            "checkpoint": saves,
        },
        ranks,
        1 if ranks == 4 else 2,
        training={"max_steps": END, "log_every": 1},
        run={"dir": str(path)},
        **({} if shard is None else {"parallel": {"data_parallel_shard": shard}}),
    )
    first: Ran = run_ranks(ranks, train_rank, resolved, Variant(scalar, LATE[optimizer]), timeout_s=120)[0]
    return first


def train_rank(rank: int, world_size: int, resolved: Any, variant: Plugin) -> Ran:
    """One rank of a run; ``variant`` owns ``build_model``."""
    probe, loaded, told = Probe(), AtLoad(), Warnings()
    environment = Environment(rank, rank, world_size, world_size, "torchrun" if world_size > 1 else "none")
    observers = {"variant": variant, "probe": probe, "at_load": loaded}
    logging.getLogger().addHandler(told)
    quiet = Quiet()
    with session(resolved, environment, RunDirectory(resolved.recipe.run.dir), observers) as trainer:
        trainer.train(quiet, quiet)
    return Ran(probe.records, loaded, told.lines)


class Warnings(logging.Handler):
    """Keeps what was warned of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def gap(records: Sequence[StepRecord], reference: Sequence[StepRecord]) -> Worst:
    """Worst relative deviation of each quantity over the steps of ``records``."""
    by_step = {record.step: record for record in reference}
    return compare(records, [by_step[record.step] for record in records])


def unequal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """Names at which tensors are not equal in every bit."""
    return sorted(
        name
        for name in one.keys() | other.keys()
        if name not in one or name not in other or not torch.equal(one[name], other[name])
    )


def check_loaded(ran: Any, saved: Any) -> None:
    """Weights and optimizer state in every bit; only the steps that were missing were done."""
    before = saved.records[HALF - 1]
    assert before.step == HALF
    assert unequal(ran.loaded.weights, before.weights) == []
    assert unequal(ran.loaded.optimizer, before.optimizer) == []
    assert [record.step for record in ran.records] == list(range(HALF + 1, END + 1))
