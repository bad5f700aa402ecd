"""``camshaft train``: one process trains here; several are started under a launcher, and owned until they end."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from camshaft import host
from camshaft.cli import inventory
from camshaft.cli.console import OverridesArgument, RecipeArgument
from camshaft.cli.launch.claim import begin, end, take
from camshaft.cli.streams import announce
from camshaft.environment import Environment, read_environment
from camshaft.errors import CamshaftError, MachineError
from camshaft.recipe import check, load

if TYPE_CHECKING:
    from camshaft.cli.launch.rank import Station
    from camshaft.environment import Launcher
    from camshaft.recipe import Resolved
    from camshaft.rundir import Choice, RunDirectory

Take = Callable[["Resolved"], "Choice"]
"""Chooses and locks the directory of one start."""

FreshOption = Annotated[bool, typer.Option("--fresh", help="Start a new run, whatever the latest one's state is.")]


def register(app: typer.Typer) -> None:
    """Add the command to the root app."""
    app.command("train")(train)


def train(recipe: RecipeArgument, overrides: OverridesArgument = None, fresh: FreshOption = False) -> None:
    """Train what a recipe describes; the same command continues a run that was interrupted or killed.

    Exit status: 0; 2 recipe; 3 machine; 4 out of memory; 5 non-finite loss; 130 stopped after a checkpoint.
    """
    from camshaft.cli import finding
    from camshaft.cli.launch.rank import supervised

    environment = read_environment(os.environ)
    changes = tuple(overrides or ())
    if environment.launcher == "none":
        resolved, processes, device = checked_here(recipe, changes)
        prepare_data(resolved)
        if finding.asked(resolved):
            resolved, changes = finding.settle(resolved, changes, processes, device, partial(take, fresh=fresh))
        if processes > 1:
            front(resolved, changes, processes, device, partial(take, fresh=fresh))
            return
    status = supervised(environment, lambda station: _rank(station, recipe, changes, fresh))
    if status:
        raise typer.Exit(status)


def checked_here(recipe: str, changes: Sequence[str]) -> tuple[Resolved, int, str]:
    """A recipe that is legal on this machine, how many processes to start here, and on what device.

    Raises:
        RecipeError: it is not legal.
        MachineError: fewer GPUs than processes.
    """
    resolved = load(recipe, changes)
    processes, device = local_processes(resolved)
    check(resolved, processes, device=device).require()
    return resolved, processes, device


def local_processes(resolved: Resolved) -> tuple[int, str]:
    """How many processes to start on this machine, and on what device.

    Raises:
        MachineError: fewer GPUs than processes.
    """
    launch = resolved.recipe.launch
    gpus = 0 if launch.device == "cpu" else _count_gpus(asked=launch.device == "cuda")
    device = "cuda" if gpus or launch.device == "cuda" else "cpu"
    processes = launch.processes if launch.processes != "auto" else max(gpus, 1)
    if device == "cuda" and processes > gpus:
        raise MachineError(
            f"{processes} process(es) on cuda need as many GPUs, and this machine shows {gpus}. "
            f"Set launch.processes={max(gpus, 1)}, or launch.device=cpu"
        )
    return processes, device


def _count_gpus(asked: bool = False) -> int:
    """GPUs that torch sees; torch is imported only where there is a driver, or a recipe has ``asked`` for one."""
    if not asked and not inventory.has_gpu_driver():
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def front(
    resolved: Resolved,
    changes: Sequence[str],
    processes: int,
    device: str,
    take: Take,
    words: Sequence[str] = ("train",),
) -> RunDirectory:
    """Start the ranks and own them until they end; returns the directory that ``take`` chose.

    ``words``: the command that every rank runs, and its options.

    Raises:
        CamshaftError: with the run's exit status, naming rank, step and cause.
    """
    from camshaft.cli.launch import commands
    from camshaft.cli.launch.joining import ERRORS
    from camshaft.cli.launch.supervisor import Job, supervise
    from camshaft.cli.launch.watch import StopSignal
    from camshaft.data import cache
    from camshaft.distributed import threads_per_rank

    launch = resolved.recipe.launch
    stop = StopSignal(grace_s=None, repeat_ends=False).install()
    with ExitStack() as stack:
        stack.callback(stop.uninstall)
        choice = take(resolved)
        stack.callback(choice.lock.release)
        line = line_of(launch.launcher, processes, resolved, changes, words)
        announce(choice.message)
        announce(f"starting     {line}")
        begin(choice.directory, resolved, processes, line)
        ranks = Environment(world_size=processes, local_world_size=processes)
        threads = threads_per_rank(ranks, launch.threads_per_rank)
        extensions = commands.extensions_folder(cache.folder(resolved.recipe.data.cache_dir, os.environ))
        environ = commands.child_environment(
            os.environ, launcher=launch.launcher, device=device, threads=threads, extensions=extensions
        )
        target = commands.target_of(str(resolved.path), changes, choice.directory.path, words)
        job = Job(
            launcher=launch.launcher,
            processes=processes,
            line=lambda folder: commands.command_line(
                launch.launcher, processes, target, job=folder, port=commands.free_port(), environ=environ
            ),
            directory=choice.directory,
            environment=environ,
        )
        outcome = supervise(job, stop)
        end(choice.directory, outcome.status)
    if outcome.status:
        raise ERRORS.get(outcome.status, CamshaftError)(outcome.message)
    return choice.directory


def line_of(
    launcher: Launcher,
    processes: int,
    resolved: Resolved,
    changes: Sequence[str],
    words: Sequence[str] = ("train",),
) -> str:
    """The line that starts the same run by hand."""
    from camshaft.cli.launch.commands import Target, equivalent

    return equivalent(launcher, processes, Target("camshaft", (*words, str(resolved.path), *changes)))


def prepare_data(resolved: Resolved) -> None:
    """Fill the cache, with progress on a terminal, before ranks wait for one another and signals mean a checkpoint."""
    from camshaft.data import prepare

    if not sys.stderr.isatty():
        prepare(resolved)
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, int] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = int(bar.add_task(stage, total=total or None))
            bar.update(tasks[stage], completed=done)  # type: ignore[arg-type]

        prepare(resolved, show)


def _rank(station: Station, recipe: str, changes: Sequence[str], fresh: bool) -> int:
    """Everything of one rank: check, connect, agree on the run directory, train."""
    from camshaft.cli import finding
    from camshaft.cli.launch.joining import in_directory, meet

    environment = station.environment
    resolved = load(recipe, changes, world_size=environment.world_size)
    check(resolved, environment.world_size, device="any").require()
    finding.refuse(resolved, environment.world_size)
    meet(station, resolved.recipe.launch)
    line = line_of(environment.launcher, environment.world_size, resolved, changes)
    with in_directory(station, resolved, partial(take, resolved, fresh), line) as (directory, _):
        return _train(station, resolved, changes, directory)


def _train(station: Station, resolved: Resolved, changes: Sequence[str], directory: RunDirectory) -> int:
    from camshaft import loop
    from camshaft.cli import closing

    environment = station.environment
    if environment.rank == 0:
        named = host.packages(resolved.recipe.plugins)
        facts = inventory.run_environment(resolved.base_dir, environment.launcher, environment.world_size, named)
        directory.keep("env.json", json.dumps(facts, indent=2) + "\n")
    return loop.run(
        resolved,
        environment,
        directory,
        station.heartbeat,
        station.stop,
        lambda state, data: closing.show(state, data, str(resolved.path), changes),
    )
