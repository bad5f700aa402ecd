"""What the kit runs on forked ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pluggy
import torch
from torch.nn import Module

from camshaft.claims import Plan
from camshaft.distributed import Environment
from camshaft.errors import Interrupted
from camshaft.loop import session
from camshaft.models.llama import Llama
from camshaft.plugin import Plugin, hookimpl
from camshaft.recipe import check
from camshaft.rundir import RunDirectory
from camshaft.testing.conformance.leftovers import changed, everywhere, left, threads_beside
from camshaft.testing.conformance.touched import watched
from camshaft.testing.record import Probe, StepRecord
from camshaft.testing.run import Quiet

if TYPE_CHECKING:
    from camshaft.loop import Trainer
    from camshaft.models.config import ModelConfig
    from camshaft.recipe import Resolved


class Stops(Quiet):
    """Asks a run to stop after ``last`` steps; None: never."""

    def __init__(self, last: int | None) -> None:
        self.last, self.step = last, 0

    def beat(self, step: int, phase: str) -> None:
        """Note how far the run is."""
        self.step = step

    @property
    def requested(self) -> int:  # type: ignore[override]
        """Whether the step that comes is the last."""
        return int(self.last is not None and self.step + 1 >= self.last)


class Variant(Plugin):
    """Owns ``build_model``: one layer and all norms are frozen, and with ``unused`` a parameter is never used."""

    draws = False

    def __init__(self, unused: bool) -> None:
        super().__init__()
        self.unused = unused

    @hookimpl
    def build_model(self, config: ModelConfig) -> Llama:
        """The built-in model, changed."""
        model = Llama(config)
        setattr(model, "draws", False)  # noqa: B010 - a module takes any attribute, its type knows of none
        self.change(model)
        return model

    def change(self, model: Llama) -> None:
        """Do the same to the reference's model."""
        for name, parameter in model.named_parameters():
            if "layers.1." in name or "norm" in name:
                parameter.requires_grad_(False)
        if self.unused:
            model.unused = torch.nn.Parameter(torch.empty(7, 3, device="meta"))


@dataclass
class Ran:
    """One rank's run: its steps, what plugins keep at the end, and what was seen beside."""

    records: list[StepRecord]
    kept: dict[str, Any] = field(default_factory=dict)
    pluggy_calls: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    touched: list[str] = field(default_factory=list)


def trained(rank: int, world_size: int, resolved: Resolved, last: int | None = None) -> Ran:
    """Train to the end, or to a checkpoint after ``last`` steps."""
    probe, stop = Probe(), Stops(last)
    kept: dict[str, Any] = {}
    try:
        with _session(resolved, rank, world_size, {"probe": probe}) as trainer:
            try:
                trainer.train(stop, stop)
            finally:
                kept = {name: dict(state_dict()) for name, state_dict, _ in trainer.state.components}
    except Interrupted:
        assert last is not None
    return Ran(probe.records, kept)


def inspected(rank: int, world_size: int, resolved: Resolved, plugin: str) -> Ran:
    """Train to the end, and look at what the kit's promises are about."""
    before, process = threading.enumerate(), everywhere()
    plan = check(resolved, world_size, device="cpu").plans.get(plugin, Plan())
    probe, stop = Probe(), Stops(None)
    with watched(plugin, plan) as touched:
        with _session(resolved, rank, world_size, {"probe": probe}) as trainer, _counted() as calls:
            trainer.train(stop, stop)
        state = trainer.state
        foreign = None if hasattr(trainer.host.plugins.get(plugin), "optimizer") else state.optimizer
        remains = left(state.model, state.world.parts.tensors, foreign)
    fresh = _fresh(trainer)
    own = left(fresh)  # the model's own hooks are no plugin's
    remains = [line for line in remains if line not in own] + changed(state.model, fresh)
    remains += sorted(everywhere() - process)
    return Ran(probe.records, {}, list(calls), remains + threads_beside(before), list(touched))


def _fresh(trainer: Trainer) -> Module:
    """The model as it was before any plugin changed it."""
    owner, state = trainer.host.owner("build_model"), trainer.state
    with torch.device("meta"):
        model: Module = Llama(state.config, state.world.ops) if owner is None else owner[1](state.world, state.config)
    return model


def varied(rank: int, world_size: int, resolved: Resolved, unused: bool) -> list[StepRecord]:
    """Train a model with frozen parameters, and with one that is never used."""
    from camshaft.testing.run import record_rank

    return record_rank(rank, world_size, resolved, {"variant": Variant(unused)})


def _session(resolved: Resolved, rank: int, world_size: int, observers: Mapping[str, Plugin]) -> Any:
    environment = Environment(rank, rank, world_size, world_size, "torchrun" if world_size > 1 else "none")
    return session(resolved, environment, RunDirectory(resolved.recipe.run.dir or ""), observers)


@contextmanager
def _counted() -> Iterator[list[str]]:
    """Names of hooks that are called through pluggy inside."""
    calls: list[str] = []
    with ExitStack() as stack:
        for name in ("__call__", "call_extra"):
            original = getattr(pluggy.HookCaller, name)
            stack.callback(setattr, pluggy.HookCaller, name, original)
            setattr(pluggy.HookCaller, name, _noting(original, calls))
        yield calls


def _noting(original: Callable[..., Any], calls: list[str]) -> Callable[..., Any]:
    def noted(self: pluggy.HookCaller, *arguments: object, **named: object) -> Any:
        calls.append(self.name)
        return original(self, *arguments, **named)

    return noted
