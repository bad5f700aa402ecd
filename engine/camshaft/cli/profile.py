"""``camshaft profile``: a window of a recipe in a trace, and what its time and its memory go to."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from camshaft.cli import finding, train
from camshaft.cli.console import OverridesArgument, RecipeArgument
from camshaft.cli.launch.claim import begin, end
from camshaft.cli.streams import announce
from camshaft.environment import read_environment
from camshaft.errors import RecipeError
from camshaft.hookspecs import FAMILIES, RunHooks
from camshaft.host import Host
from camshaft.recipe import check, load
from camshaft.rundir import Choice, RunDirectory

if TYPE_CHECKING:
    from camshaft.cli.launch.rank import Station
    from camshaft.recipe import Checked, Resolved

SPECS = tuple(name for family in FAMILIES for name in vars(family) if not name.startswith("_"))
_TELLING = frozenset({"log", "save", "load"})
_HARMLESS = frozenset(
    {
        *(name for name in vars(RunHooks) if not name.startswith("_")),
        "plan", "bind", "post_step", "around_step", "around_forward", "estimate",
    }
)  # fmt: skip

_QUIET = {"KINETO_LOG_LEVEL": "6", "TORCH_CPP_LOG_LEVEL": "ERROR"}
"""Read when torch is imported: its profiler reports its own start and end, and memory that was there before."""

StepsOption = Annotated[int, typer.Option("--steps", min=1, help="Windows (optimizer steps) to record.")]
WarmupOption = Annotated[int, typer.Option("--warmup", min=0, help="Windows to run before, without the profiler.")]
OutOption = Annotated[
    str | None,
    typer.Option("--out", help="An empty folder for the profile; default: <run.root>/<name>/profile-<time>."),
]


def register(app: typer.Typer) -> None:
    """Add the command to the root app."""
    app.command("profile")(profile)


def profile(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    steps: StepsOption = 1,
    warmup: WarmupOption = 3,
    out: OutOption = None,
) -> None:
    """Record a window of training: a trace a rank, time by operation, exposed communication, memory and MFU.

    Continues no run and writes no checkpoint: plugins that only tell, load or save are left out.
    """
    from camshaft.cli.launch.rank import supervised

    os.environ.update({name: os.environ.get(name, level) for name, level in _QUIET.items()})
    environment = read_environment(os.environ)
    changes = tuple(overrides or ())
    if environment.launcher == "none":
        resolved = load(recipe, changes)
        processes, device = train.local_processes(resolved)
        check(resolved, processes, device=device).require()
        _settled(resolved)
        train.prepare_data(resolved)
        if processes > 1:
            words = ("profile", f"--steps={steps}", f"--warmup={warmup}")
            directory = train.front(resolved, changes, processes, device, partial(take, out=out), words)
            _close(directory)
            return
    status = supervised(environment, lambda station: _rank(station, recipe, changes, (warmup, steps), out))
    if status:
        raise typer.Exit(status)


def take(resolved: Resolved, out: str | None) -> Choice:
    """A new folder for one profile, locked; never one that holds anything, and never the latest run of its recipe.

    Raises:
        RecipeError: ``out`` is no folder, or holds files.
        MachineError: it cannot be made, or another process has it.
    """
    recipe = resolved.recipe
    identity = f"profile-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"
    path = Path(recipe.run.root) / recipe.name / identity if out is None else Path(out)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise RecipeError(f"--out {path} is not an empty folder. Give the name of a new one")
    directory = RunDirectory(path)
    lock = directory.create().lock()
    return Choice(directory, lock, False, f"profile directory {path}")


def telling(host: Host, checked: Checked) -> list[str]:
    """Plugins that write, read or show records and checkpoints, and have no part in the training itself."""
    found = []
    for name, plugin in host.plugins.items():
        hooks = {hook for hook in SPECS if any(owner == name for owner, _ in host.implementations(hook))}
        if hooks & _TELLING and hooks <= _HARMLESS and not checked.plans[plugin.name].claims:
            found.append(name)
    return found


def _rank(station: Station, recipe: str, changes: Sequence[str], windows: tuple[int, int], out: str | None) -> int:
    """Everything of one rank: check, connect, agree on the directory, profile."""
    environment = station.environment
    resolved, left_out = lean(recipe, changes, environment.world_size)
    from camshaft.distributed import connect, pick_device, set_threads

    launch = resolved.recipe.launch
    set_threads(environment, launch.threads_per_rank)
    station.heartbeat.beat(0, "connect")
    connect(environment, pick_device(launch, environment).type, launch.group_timeout_s)
    with ExitStack() as stack:
        directory = station.directory
        owner = station.front is None and environment.rank == 0
        if directory is None:
            directory = train.agree_on_directory(station, partial(take, resolved, out), stack)
            station.enter(directory)
        if owner:
            words = ("profile", f"--warmup={windows[0]}", f"--steps={windows[1]}")
            line = train.line_of(environment.launcher, environment.world_size, resolved, changes, words)
            begin(directory, resolved, environment.world_size, line)
        return _profile(station, resolved, directory, windows, left_out, owner)


def lean(recipe: str, changes: Sequence[str], world_size: int) -> tuple[Resolved, list[str]]:
    """The recipe without plugins that only tell, load or save, and their names.

    What runs out of memory ends it: in halves a trial of any micro batch would fit, and a window have other phases.
    """
    resolved = load(recipe, changes, world_size=world_size)
    checked = check(resolved, world_size, device="any")
    checked.require()
    _settled(resolved)
    left_out = telling(Host.of(resolved.recipe.plugins), checked)
    without = [*(f"plugins.{name}=null" for name in left_out), "batch.on_out_of_memory=stop"]
    resolved = load(recipe, [*changes, *without], world_size=world_size)
    check(resolved, world_size, device="any").require()
    return resolved, left_out


def _settled(resolved: Resolved) -> None:
    """Refuse a micro batch that is yet to be found: a profile is of one size."""
    if finding.asked(resolved):
        fix = "give batch.micro_batch_size=N, for example what `camshaft train` found (in its resolved.yaml)"
        raise RecipeError(resolved.problem(finding.MICRO, "auto is found by `camshaft train`, not by a profile", fix))


def _profile(
    station: Station,
    resolved: Resolved,
    directory: RunDirectory,
    windows: tuple[int, int],
    left_out: list[str],
    owner: bool,
) -> int:
    from camshaft.cli.launch import exits
    from camshaft.profiling.recording import Settings
    from camshaft.profiling.run import run

    station.heartbeat.beat(0, "build")
    status = 1
    settings = Settings(*windows)
    try:
        words = run(resolved, station.environment, directory, station.heartbeat, station.stop, settings, left_out)
        if words:
            announce(f"\n{words}")
        status = 0
        if owner:
            _close(directory)
        return status
    except BaseException as error:
        status = exits.classify(error)[0]
        raise
    finally:
        if owner:
            end(directory, status, station.heartbeat.progress[0])


def _close(directory: RunDirectory) -> None:
    announce(f"traces       {directory.path}/trace_rank_*.json (https://ui.perfetto.dev or chrome://tracing)")
    announce(f"report       {directory.path / 'profile.txt'}, and as data in profile.json")
