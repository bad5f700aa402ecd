"""One rank of a trial: a run built for real, and two windows of it. Nothing is loaded, logged or saved.

The first step allocates what the optimizer keeps, so only the second is as full as all that follow.
"""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING

import torch

from camshaft.errors import OutOfMemory
from camshaft.loop import out_of_memory, session

if TYPE_CHECKING:
    from camshaft.environment import Environment
    from camshaft.loop import Heartbeat, Trainer
    from camshaft.recipe import Resolved
    from camshaft.rundir import RunDirectory

STEPS = 2


def run(resolved: Resolved, environment: Environment, directory: RunDirectory, heartbeat: Heartbeat) -> int:
    """Run ``STEPS`` windows on one rank and return the most bytes that it held: of its GPU, or of the whole process.

    Raises:
        OutOfMemory: it did not fit into the device, or into ``launch.memory_gib``.
    """
    limit = resolved.recipe.launch.memory_gib
    with out_of_memory(), session(resolved, environment, directory) as trainer:
        device = trainer.state.world.device
        if device.type == "cuda" and not isinstance(limit, str):
            whole = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit * 2**30 / whole), device)
        _windows(trainer, heartbeat)
        most = _most(device)
    if not isinstance(limit, str) and most > limit * 2**30:
        raise OutOfMemory(f"rank {environment.rank} held {most / 2**30:.3g} GiB, launch.memory_gib is {limit:g}")
    return most


def _windows(trainer: Trainer, heartbeat: Heartbeat) -> None:
    state = trainer.state
    for _ in range(STEPS):
        state.window = state.loader.next()
        if state.window is None:
            return
        trainer.stepper.run(False, heartbeat.beat)


def _most(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # what failed on the device says so here
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
