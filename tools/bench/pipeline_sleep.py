"""How far pipelines are from what the simulator says: stages that sleep, a measured step over the simulated one."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from camshaft.data import prepare
from camshaft.models.init import materialize
from camshaft_pipeline.replay import Times
from camshaft_pipeline.schedules import make
from camshaft_pipeline.simulator import simulate
from tools.bench.peers import Contestant, Job
from tools.bench.peers_pipeline import TorchPipeline
from tools.bench.pipeline import OURS, TORCH, own_stages, placement_of
from tools.bench.processes import Build, alive
from tools.bench.setup import Case, recipe_of, scratch
from tools.bench.sleeping import Naps, Sleepers, SleepingCamshaft, SleepingStage

RANKS, MICROBATCHES = (2, 4), (8, 16)
SECONDS = 0.012
"""Forward, I and W of a microbatch in a stage take this each, however many stages a rank has."""
SCHEDULES = ("gpipe", "1f1b", "interleaved_1f1b", "zb_h1", "zbv", "dualpipe_v")
MOST = 1.05
"""A measured step over the simulated one, at most."""


class SleepingTorch(TorchPipeline):
    """Torch's schedule over the same stages."""

    def __init__(self, schedule: str, seconds: float, job: Job) -> None:
        own, count = own_stages(schedule, job)
        self.naps = Naps(seconds)
        with torch.device("meta"):
            model = Sleepers(count, self.naps)
            stages = nn.ModuleList(SleepingStage(model, index) for index in own)
        materialize(model, seed=job.resolved.recipe.seed, device=torch.device("cpu"), dtype=torch.float32)
        for index in own:
            model.layers[index].nap_on_weights()  # type: ignore[operator]
        super().__init__(job, schedule, stages, own, count)
        self._own, self._begun = len(own) * job.case.accumulation, False

    def steps(self, count: int) -> float:
        """Run ``count`` windows."""
        loss = super().steps(count)
        if self._begun:
            self.naps.check(count * self._own)
        else:  # torch runs stages once more in its first window, to see shapes
            self.naps.forget()
        self._begun = True
        return loss

    def loss(self, made: Tensor, _: Tensor) -> Tensor:
        """The sum of what the last stage made."""
        return made.sum() / self.weight


def camshaft(schedule: str, seconds: float, job: Job) -> Contestant:
    """Our contestant."""
    return SleepingCamshaft(own_stages(schedule, job)[1], seconds, job)


def race(schedule: str, ranks: int, microbatches: int, blocks: int, steps: int = 2) -> dict[str, Any]:
    """Time both engines in turns; every contestant's step is the median of its blocks.

    Raises:
        AssertionError: the losses differ, so it was not the same work.
    """
    stages = len(placement_of(schedule, ranks))
    seconds = SECONDS
    case = Case("sleep", {"preset": "llama-nano", "num_hidden_layers": stages}, 32, 1, microbatches, "fp32", steps, 0)
    divided_by = {"pipeline": {"schedule": schedule, "split": {"balance": "layers"}}}
    with scratch() as folder, ExitStack() as stack:
        resolved = recipe_of(case, ranks, folder, divided_by, {"pipeline_parallel": ranks})
        prepare(resolved)
        jobs = [Job(resolved, case, rank, ranks) for rank in range(ranks)]
        runners = {}
        builds: dict[str, Build] = {OURS: partial(camshaft, schedule, seconds)}
        builds[TORCH] = partial(SleepingTorch, schedule, seconds)
        for name, build in builds.items():
            runners[name] = stack.enter_context(alive(name, jobs, build, True))
            runners[name].ask("build")
        found = {name: [runner.steps(steps)] for name, runner in runners.items()}  # to warm up
        for block in range(blocks):
            for name in (OURS, TORCH) if block % 2 else (TORCH, OURS):
                found[name].append(runners[name].steps(steps))
    losses = {name: measured[0].loss for name, measured in found.items()}
    gap = max(losses.values()) - min(losses.values())
    assert gap <= 1e-5 * max(map(abs, losses.values())), f"not the same work: losses {losses}"
    simulated = simulate(make(schedule, ranks, microbatches), Times(seconds, seconds, seconds)).makespan
    times = {name: statistics.median(block.seconds for block in measured[1:]) for name, measured in found.items()}
    return _row(schedule, ranks, microbatches, simulated, times)


def _row(schedule: str, ranks: int, microbatches: int, simulated: float, times: dict[str, float]) -> dict[str, Any]:
    ours, theirs = times[OURS] / simulated, times[TORCH] / simulated
    return {
        "schedule": schedule,
        "ranks": ranks,
        "microbatches": microbatches,
        "simulated_ms": simulated * 1e3,
        "ours": ours,
        "torch": theirs,
        "met": ours <= MOST and ours < theirs,
    }


def run(blocks: int | None, names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Both engines over our simulated step; torch's ZB-H1 is its interleaved zero bubble with one stage a rank.

    Every schedule on 2 and 4 ranks with 8 and 16 microbatches, or those of these names.
    """
    return [
        race(schedule, ranks, microbatches, blocks or 3)
        for ranks in RANKS
        for microbatches in MICROBATCHES
        for schedule in SCHEDULES
        if not names or schedule in names
    ]
