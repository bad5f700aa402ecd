"""``camshaft validate``: everything that can be known to be wrong without starting a run."""

from __future__ import annotations

import typer

from camshaft.cli.console import OverridesArgument, RecipeArgument, WorldSizeOption, say
from camshaft.recipe import check, load


def register(app: typer.Typer) -> None:
    app.command("validate")(validate)


def validate(recipe: RecipeArgument, overrides: OverridesArgument = None, world_size: WorldSizeOption = None) -> None:
    """Check a recipe and say everything that is wrong with it. Needs neither torch nor a GPU."""
    resolved = load(recipe, overrides or (), world_size=world_size)
    check(resolved, world_size).require()
    say(f"{recipe}: valid")
