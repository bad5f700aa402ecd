"""What the ranks of every command do around their own work: meet, share a directory, say how it ended."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from camshaft.cli.launch import exits, heartbeat
from camshaft.cli.launch.claim import begin, end
from camshaft.cli.streams import announce
from camshaft.errors import CamshaftError, Interrupted, MachineError, NonFiniteLoss, OutOfMemory, RecipeError
from camshaft.rundir import RunDirectory

if TYPE_CHECKING:
    from camshaft.cli.launch.rank import Station
    from camshaft.recipe import Resolved
    from camshaft.recipe.schema import Launch
    from camshaft.rundir import Choice

ERRORS: dict[int, type[CamshaftError]] = {
    error.exit_status: error for error in (RecipeError, MachineError, OutOfMemory, NonFiniteLoss, Interrupted)
}
"""Exit status to the error that ends with it."""


def meet(station: Station, launch: Launch) -> None:
    """Choose a device and threads, and connect to the other ranks."""
    from camshaft.distributed import connect, pick_device, set_threads

    set_threads(station.environment, launch.threads_per_rank)
    station.heartbeat.beat(0, "connect")
    connect(station.environment, pick_device(launch, station.environment).type, launch.group_timeout_s)


@contextmanager
def in_directory(
    station: Station, resolved: Resolved, take: Callable[[], Choice], line: str
) -> Iterator[tuple[RunDirectory, bool]]:
    """The directory of all ranks, and whether this rank owns it: it keeps the status there, until the end.

    That is the front's where there is one, else what ``take`` chooses on rank 0. ``line`` would start the same by hand.
    """
    with ExitStack() as stack:
        directory = station.directory
        owner = station.front is None and station.environment.rank == 0
        if directory is None:
            directory = _agreed(station, take, stack)
            station.enter(directory)
        if owner:
            begin(directory, resolved, station.environment.world_size, line)
        station.heartbeat.beat(0, "build")
        status = 1
        try:
            yield directory, owner
            status = 0
        except BaseException as error:
            status = exits.classify(error)[0]
            raise
        finally:
            if owner:
                end(directory, status, station.heartbeat.progress[0])


def _agreed(station: Station, take: Callable[[], Choice], stack: ExitStack) -> RunDirectory:
    """Rank 0 picks and locks the directory, the others learn it; an error of rank 0 is raised on every rank."""
    from camshaft.distributed import share_text

    environment = station.environment
    answer: dict[str, str] = {}
    if environment.rank == 0:
        try:
            choice = take()
            stack.callback(choice.lock.release)
            heartbeat.create(choice.directory.heartbeat, environment.world_size)
            announce(choice.message)
            answer = {"path": str(choice.directory.path.resolve())}
        except (MachineError, RecipeError) as error:
            answer = {"error": str(error), "status": str(error.exit_status)}
    answer = json.loads(share_text(environment, json.dumps(answer)))
    if "error" in answer:
        raise ERRORS[int(answer["status"])](answer["error"])
    return RunDirectory(answer["path"]).create()
