"""``camshaft hooks``: every hook in run order, its arguments, and who implements it in a recipe."""

from __future__ import annotations

import inspect
from typing import Annotated

import typer

from camshaft.cli.console import OverridesArgument, columns, say
from camshaft.hookspecs import FAMILIES
from camshaft.host import Host
from camshaft.recipe import load


def register(app: typer.Typer) -> None:
    """Add the command to the root app."""
    app.command("hooks")(hooks)


def hooks(
    recipe: Annotated[str | None, typer.Argument(help="Show who implements each hook in this recipe.")] = None,
    overrides: OverridesArgument = None,
) -> None:
    """List every hook in run order: kind, arguments, and with a recipe the plugins that implement it."""
    host = None if recipe is None else Host.of(load(recipe, overrides or ()).recipe.plugins)
    headers = ["hook", "kind", "arguments"] + ([] if host is None else ["implemented by"])
    for family in FAMILIES:
        rows = []
        for name, function in vars(family).items():
            if name.startswith("_"):
                continue
            row = [name, _kind(function), ", ".join(list(inspect.signature(function).parameters)[1:])]
            if host is not None:
                row.append(", ".join(plugin for plugin, _ in host.implementations(name)) or "-")
            rows.append(tuple(row))
        say(f"{(family.__doc__ or '').splitlines()[0]}\n{columns(tuple(headers), rows)}\n")


def _kind(function: object) -> str:
    """First word of the hook's docstring: collected, slot, chain, event or middleware."""
    return (inspect.getdoc(function) or "?").split(".")[0].split(",")[0].lower()
