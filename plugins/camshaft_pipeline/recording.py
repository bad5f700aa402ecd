"""Measures the actions of one window, and draws them beside the simulation of the same times."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from camshaft.program import COMPUTE, Action, Kind
from camshaft_pipeline.drawing import svg, trace
from camshaft_pipeline.replay import Times
from camshaft_pipeline.schedule import Schedule
from camshaft_pipeline.simulator import simulate

if TYPE_CHECKING:
    from camshaft.state import State
    from camshaft_pipeline.executor import Executor

STEP = 2
"""Steps that are done before the measured one: in the first, shapes are agreed."""
Entry = tuple[int, Action, float, float]
Handler = Callable[[Action], None]


class Recorder:
    """Times of one window's computations, without what they waited for. On a device each action is waited for."""

    def __init__(self, state: State, schedule: Schedule, executor: Executor) -> None:
        world = state.world
        self._state, self._schedule, self._executor = state, schedule, executor
        self._place = world.mesh.shape.coordinates(world.rank)["pp"]
        self._group = world.mesh.group("pp")
        self._step: int | None = None
        self.entries: list[Entry] = []

    def around(self, handlers: Mapping[Kind, Handler]) -> dict[Kind, Handler]:
        """The same handlers, measured."""
        return {kind: self._measured(call) if kind in COMPUTE else call for kind, call in handlers.items()}

    def _measured(self, call: Handler) -> Handler:
        def run(action: Action) -> None:
            if self._step is None:
                self._step = min(self._state.step + STEP, self._state.world.total_steps - 1)
            call(action)
            if self._state.step == self._step:
                if self._state.world.device.type == "cuda":
                    torch.cuda.synchronize(self._state.world.device)
                self.entries.append((self._place, action, self._executor.began, time.time()))

        return run

    def finish(self) -> None:
        """After the measured step: rank 0 writes the drawings of its pipeline. Collective along ``pp``."""
        if not self.entries:
            return
        ranks = dist.get_process_group_ranks(self._group)
        found: list[list[Entry]] | None = None
        if self._state.world.rank == ranks[0]:
            found = [[] for _ in ranks]
        dist.gather_object(self.entries, found, dst=ranks[0], group=self._group)
        self.entries = []
        if found is not None and self._state.world.is_main:
            write(self._schedule, [entry for entries in found for entry in entries], self._state.world.run.path)


def write(schedule: Schedule, measured: list[Entry], folder: Path) -> None:
    """Write ``pipeline.trace.json`` and ``pipeline.svg`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    timeline = simulate(schedule, times_of(measured, schedule.stages))
    (folder / "pipeline.trace.json").write_text(trace.draw(timeline, measured), encoding="utf-8")
    (folder / "pipeline.svg").write_text(svg.draw(timeline, measured=measured), encoding="utf-8")


def times_of(measured: list[Entry], stages: int) -> Times:
    """Median times of each stage; where backward was never split, half of it counts for each of its two parts."""
    found: dict[tuple[Kind, int], list[float]] = {}
    for _, action, start, end in measured:
        found.setdefault((action.kind, action.stage), []).append(end - start)

    def middle(kind: Kind, stage: int) -> float:
        if (kind, stage) in found:
            return median(found[kind, stage])
        return median(found[Kind.B, stage]) / 2

    forward, inputs, weights = ([middle(kind, stage) for stage in range(stages)] for kind in (Kind.F, Kind.I, Kind.W))
    return Times(forward, inputs, weights)
