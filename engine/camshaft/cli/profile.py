"""``camshaft profile``: a window of a recipe in a trace, and what its time and its memory go to."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from camshaft.cli import finding, train
from camshaft.cli.console import OverridesArgument, RecipeArgument
from camshaft.cli.launch.scratch import Scratch
from camshaft.cli.streams import announce
from camshaft.environment import read_environment
from camshaft.errors import RecipeError
from camshaft.hookspecs import FAMILIES, RunHooks
from camshaft.host import Host
from camshaft.recipe import check, load

if TYPE_CHECKING:
    from camshaft.cli.launch.rank import Station
    from camshaft.cli.train import Take
    from camshaft.recipe import Checked, Resolved
    from camshaft.rundir import Choice, RunDirectory

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
    changes, windows = tuple(overrides or ()), (warmup, steps)
    if environment.launcher == "none":
        resolved, processes, device = train.checked_here(recipe, changes)
        _settled(resolved)
        folder = folder_of(resolved, out)
        train.prepare_data(resolved)
        if processes > 1:
            try:
                directory = train.front(resolved, changes, processes, device, _taken(folder), _words(windows))
            except BaseException as error:
                folder.give_up(error)
                raise
            _close(directory)
            return
    status = supervised(environment, lambda station: _rank(station, recipe, changes, windows, out), keeps=False)
    if status:
        raise typer.Exit(status)


def folder_of(resolved: Resolved, out: str | None) -> Scratch:
    """Where one profile goes: never to where anything is, and never the latest run of its recipe.

    Raises:
        RecipeError: ``out`` is no folder, or holds files.
    """
    recipe = resolved.recipe
    identity = f"profile-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"
    folder = Scratch(Path(recipe.run.root) / recipe.name / identity if out is None else Path(out))
    if not folder.usable:
        raise RecipeError(f"--out {folder.path} is not an empty folder. Give the name of a new one")
    return folder


def _taken(folder: Scratch) -> Take:
    return lambda _: folder.take(f"profile directory {folder.path}")


def _words(windows: tuple[int, int]) -> tuple[str, ...]:
    """What a rank is called with."""
    return ("profile", f"--warmup={windows[0]}", f"--steps={windows[1]}")


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
    from camshaft.cli.launch.joining import in_directory, meet

    environment = station.environment
    resolved, left_out = lean(recipe, changes, environment.world_size)
    meet(station, resolved.recipe.launch)
    line = train.line_of(environment.launcher, environment.world_size, resolved, changes, _words(windows))
    folder: list[Scratch] = []

    def take() -> Choice:
        folder.append(folder_of(resolved, out))
        station.forced = folder[0].remove
        return _taken(folder[0])(resolved)

    try:
        with in_directory(station, resolved, take, line) as (directory, owner):
            return _profile(station, resolved, directory, windows, left_out, owner)
    except BaseException as error:
        for each in folder:
            each.give_up(error)
        raise


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
    from camshaft.profiling.recording import Settings
    from camshaft.profiling.run import run

    settings = Settings(*windows)
    words = run(resolved, station.environment, directory, station.heartbeat, station.stop, settings, left_out)
    if words:
        announce(f"\n{words}")
    if owner:
        _close(directory)
    return 0


def _close(directory: RunDirectory) -> None:
    announce(f"traces       {directory.path}/trace_rank_*.json (https://ui.perfetto.dev or chrome://tracing)")
    announce(f"report       {directory.path / 'profile.txt'}, and as data in profile.json")
