"""Running a recipe on forked ranks, recorded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from camshaft.distributed import Environment
from camshaft.loop import session
from camshaft.plugin import Plugin
from camshaft.rundir import RunDirectory
from camshaft.testing.ranks import run_ranks
from camshaft.testing.record import Probe, StepRecord

if TYPE_CHECKING:
    from camshaft.recipe import Resolved


class Quiet:
    """Stands for the heartbeat and the stop signal where no launcher is around."""

    requested = 0

    def beat(self, step: int, phase: str) -> None:
        """Nobody listens."""


def record_rank(
    rank: int, world_size: int, resolved: Resolved, observers: Mapping[str, Plugin] | None = None
) -> list[StepRecord]:
    """Train one rank of ``resolved`` to its end (``run.dir`` must be set) and return every step."""
    probe = Probe()
    environment = Environment(rank, rank, world_size, world_size, "torchrun" if world_size > 1 else "none")
    directory = RunDirectory(resolved.recipe.run.dir or "")
    quiet = Quiet()
    with session(resolved, environment, directory, {**(observers or {}), "probe": probe}) as trainer:
        trainer.train(quiet, quiet)
    return probe.records


def record_ranks(
    resolved: Resolved, world_size: int, observers: Mapping[str, Plugin] | None = None, timeout_s: float = 120.0
) -> list[list[StepRecord]]:
    """Records of every rank, on forked ranks."""
    return run_ranks(world_size, record_rank, resolved, observers, timeout_s=timeout_s)
