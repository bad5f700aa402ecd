"""Taking a run directory for one start: choosing and locking it, and keeping its status."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from camshaft import finder
from camshaft.cli.console import warn
from camshaft.cli.launch import changes, heartbeat
from camshaft.cli.streams import announce
from camshaft.errors import MachineError
from camshaft.processes import alive, myself
from camshaft.recipe.checks import AUTO
from camshaft.rundir import Choice, RunDirectory, choose, digest, utc_now

if TYPE_CHECKING:
    from camshaft.recipe import Resolved

_EARLIER_S = 25.0
_STATES = {0: "finished", 130: "interrupted"}


def take(resolved: Resolved, fresh: bool) -> Choice:
    """Choose and lock the run directory, and wait until ranks of an earlier, killed run have left it."""
    recipe = resolved.recipe
    choice = choose(recipe.run, recipe.name, digest(resolved.values()), fresh=fresh)
    limit = time.monotonic() + _EARLIER_S
    told = False
    while left := _earlier_ranks(choice.directory):
        if time.monotonic() > limit:
            choice.lock.release()
            raise MachineError(
                f"rank {left[0].rank} (pid {left[0].process.pid}) of an earlier run still works in "
                f"{choice.directory.path}. Stop it, or give another run.dir"
            )
        if not told:
            warn(f"waiting for {len(left)} rank(s) of an earlier run in {choice.directory.path} to end")
            told = True
        time.sleep(0.2)
    return choice


def _earlier_ranks(directory: RunDirectory) -> list[heartbeat.Beat]:
    own = myself()
    return [beat for beat in heartbeat.read(directory.heartbeat) if beat.process != own and alive(beat.process)]


def begin(directory: RunDirectory, resolved: Resolved, world_size: int, line: str) -> None:
    """Keep what this start was, say what it changes in a run that is continued, and mark the run as running.

    ``certificate`` in the status tells of the proof that is valid for this recipe here; null where there is none.
    """
    from camshaft.verify import certificate

    values = resolved.values()
    found = finder.read(directory.path)
    if found is not None and found.micro_batch_size == values["batch"]["micro_batch_size"]:
        values["batch"]["micro_batch_size"] = AUTO  # as its user wrote it: the same command finds this run again
        how = (found.micro_batch_size, f"found for {AUTO} in {len(found.trials)} trial(s)")
        resolved = replace(resolved, derived={**resolved.derived, "batch.micro_batch_size": how})
    for change in changes.since_the_start(directory.path / "resolved.yaml", resolved):
        announce(change)
    directory.keep("recipe.yaml", resolved.path.read_text(encoding="utf-8"))
    directory.keep("resolved.yaml", resolved.dump())
    before = directory.read_status()
    directory.write_status(
        name=resolved.recipe.name,
        state="running",
        step=before.get("step", 0),
        started=before.get("started") or utc_now(),
        resumed=utc_now() if before else None,
        ended=None,
        exit_status=None,
        world_size=world_size,
        command=line,
        certificate=certificate.lookup(resolved),
        digest=digest(values),
    )


def end(directory: RunDirectory, status: int, step: int | None = None) -> None:
    """Mark how the run ended."""
    if step is None:
        step = max((beat.step for beat in heartbeat.read(directory.heartbeat)), default=0)
    directory.write_status(state=_STATES.get(status, "failed"), ended=utc_now(), exit_status=status, step=step)
