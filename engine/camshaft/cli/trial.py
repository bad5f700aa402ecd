"""``camshaft trial``, hidden: one trial of a micro batch, on every rank of a run of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from camshaft.cli.console import OverridesArgument, RecipeArgument
from camshaft.environment import read_environment
from camshaft.errors import Problem, RecipeError
from camshaft.rundir import RunDirectory

if TYPE_CHECKING:
    from camshaft.cli.launch.rank import Station


def register(app: typer.Typer) -> None:
    """Add the command to the root app."""
    app.command("trial", hidden=True)(trial)


def trial(recipe: RecipeArgument, overrides: OverridesArgument = None) -> None:
    """Build a run and train two windows of it, to see whether it fits. Exit status 4 says that it does not."""
    from camshaft.cli.launch.rank import supervised

    changes = tuple(overrides or ())
    status = supervised(read_environment(os.environ), lambda station: _rank(station, recipe, changes), keeps=False)
    if status:
        raise typer.Exit(status)


def _rank(station: Station, recipe: str, changes: Sequence[str]) -> int:
    from camshaft import trial as trials
    from camshaft.cli.launch.joining import meet
    from camshaft.cli.profile import lean

    environment = station.environment
    resolved, _ = lean(recipe, changes, environment.world_size)
    if resolved.recipe.run.dir is None:
        raise RecipeError(Problem("a trial needs a folder of its own", key="run.dir"))
    meet(station, resolved.recipe.launch)
    directory = station.directory or RunDirectory(resolved.recipe.run.dir).create()
    station.heartbeat.beat(0, "build")
    peak = trials.run(resolved, environment, directory, station.heartbeat)
    (directory.path / f"rank_{environment.rank}.peak.json").write_text(json.dumps(peak))
    return 0
