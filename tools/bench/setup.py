"""What every contestant of a benchmark shares: the recipe, the samples, the model's first values."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from camshaft.data import prepare
from camshaft.data.loader import Loader, Window
from camshaft.distributed import Environment
from camshaft.loop import Trainer, session
from camshaft.models.init import materialize
from camshaft.models.llama import Llama
from camshaft.plugin import Plugin
from camshaft.recipe import Resolved, check, load
from camshaft.rundir import RunDirectory

ADAMW = {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}
MAX_NORM = 1.0
BUCKET_MB = 25.0
"""Of everybody who has buckets: torch's DistributedDataParallel has it by default."""


@dataclass(frozen=True, slots=True)
class Case:
    """One size of model and batch."""

    name: str
    model: dict[str, object]
    sequence_length: int
    micro_batch_size: int
    accumulation: int
    compute: str
    steps: int
    """Steps in a block."""
    blocks: int
    """Blocks of each contestant."""


def recipe_of(
    case: Case,
    world_size: int,
    folder: Path,
    divided_by: dict[str, Any] | None = None,
    parallel: dict[str, int] | None = None,
) -> Resolved:
    """Write and load the recipe of a case; ``divided_by`` holds the plugin that uses the ranks, and its options.

    ``parallel`` are degrees of axes beside the data axis. Rows are packed without masks, so every window has the same
    weight.
    """
    data_ranks = world_size // math.prod((parallel or {}).values())
    tree = {
        "schema_version": 1,
        "name": case.name,
        "model": case.model,
        "tokenizer": {"type": "bpe", "vocab_size": 1024},
        "data": {"train": "python-docs", "sequence_length": case.sequence_length, "document_mask": False},
        "batch": {
            "micro_batch_size": case.micro_batch_size,
            "global_batch_size": case.micro_batch_size * case.accumulation * data_ranks,
        },
        "training": {"max_steps": 1_000_000, "log_every": 1_000_000},
        "parallel": parallel or {},
        "launch": {"device": "cpu", "threads_per_rank": 1},
        "run": {"dir": str(folder / "run")},
        "plugins": {
            **(divided_by or {"ddp": {"bucket_size_mb": BUCKET_MB}}),
            "adamw": ADAMW,
            "clip": {"max_norm": MAX_NORM},
            "precision": {"compute": case.compute},
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return load(path, world_size=world_size)


@contextmanager
def engine(
    resolved: Resolved, rank: int, world_size: int, observers: Mapping[str, Plugin] | None = None
) -> Iterator[Trainer]:
    """The engine, built and ready to step; ``observers`` are plugins beside the recipe's."""
    environment = Environment(rank, rank, world_size, world_size, "torchrun" if world_size > 1 else "none")
    with session(resolved, environment, RunDirectory(resolved.recipe.run.dir or ""), observers) as trainer:
        yield trainer


def plain_model(resolved: Resolved) -> Llama:
    """The same model with the same first values, without the engine."""
    config = check(resolved, None).require().config
    assert config is not None
    with torch.device("meta"):
        model = Llama(config)
    materialize(model, seed=resolved.recipe.seed, device=torch.device("cpu"), dtype=torch.float32)
    return model


def plain_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """The groups that the recipe's plugin makes: no decay of vectors."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    decay = float(str(ADAMW["weight_decay"]))
    return [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]


def plain_optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    """Torch's fused AdamW over them."""
    return torch.optim.AdamW(plain_groups(model), lr=1e-3, betas=(0.9, 0.95), fused=True)


def plain_loader(resolved: Resolved, rank: int, world_size: int) -> Loader:
    """The samples that the engine gives ``rank``, without the engine."""
    checked = check(resolved, world_size).require()
    assert checked.batch is not None and checked.mesh is not None
    index, degree = checked.mesh.batch_index(rank), checked.mesh.batch_degree
    data = prepare(resolved).train
    loader = Loader(data, checked.batch, index=index, degree=degree, seed=resolved.recipe.seed, stop=None)
    loader.seek(0)
    return loader


def twin_loader(trainer: Trainer) -> Loader:
    """Another loader of the same samples, for the contestant beside the engine."""
    world = trainer.state.world
    loader = Loader(
        trainer.data.train,
        world.batch,
        index=world.mesh.shape.batch_index(world.rank),
        degree=world.mesh.shape.batch_degree,
        seed=world.recipe.seed,
        stop=None,
    )
    loader.seek(0)
    return loader


def engine_steps(trainer: Trainer, count: int) -> float:
    """Run ``count`` windows as the loop does; returns the last loss of this rank (its sum over its weight).

    0 on a rank of a pipeline that makes no loss.
    """
    state = trainer.state
    for _ in range(count):
        state.window = state.loader.next()
        trainer.stepper.run(False)
        trainer.stepper.post_step(state)
        assert isinstance(state.window, Window)
        trainer.meter.count(state.window.tokens)
    assert state.window is not None and (state.loss is not None or not state.world.makes_loss)
    return 0.0 if state.loss is None else float(state.loss) / state.window.weight


def median_ratio(times: list[float], base: list[float]) -> float:
    """Ratio of medians: above 1 is slower than ``base``."""
    return statistics.median(times) / statistics.median(base)


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
