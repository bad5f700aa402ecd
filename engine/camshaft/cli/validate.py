"""``camshaft validate``: everything that can be known to be wrong without starting a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from camshaft.cli import inventory
from camshaft.cli.console import OverridesArgument, RecipeArgument, WorldSizeOption, say
from camshaft.recipe import check, load

if TYPE_CHECKING:
    from camshaft.recipe import Resolved


def register(app: typer.Typer) -> None:
    app.command("validate")(validate)


def validate(recipe: RecipeArgument, overrides: OverridesArgument = None, world_size: WorldSizeOption = None) -> None:
    """Check a recipe and say everything that is wrong with it. Needs neither torch nor a GPU."""
    resolved = load(recipe, overrides or (), world_size=world_size)
    check(resolved, world_size, device=device_of(resolved, elsewhere=world_size is not None)).require()
    say(f"{recipe}: valid")


def device_of(resolved: Resolved, *, elsewhere: bool) -> str:
    """The device that ``train`` would take here; ``any`` where the recipe is for another machine than this one.

    That is a recipe for GPUs where there is none, and one that leaves its device open and is asked about ``elsewhere``.
    """
    stated = resolved.recipe.launch.device
    here = "cuda" if inventory.has_gpu_driver() else "cpu"
    if stated == "auto":
        return "any" if elsewhere else here
    return stated if stated in ("cpu", here) else "any"
