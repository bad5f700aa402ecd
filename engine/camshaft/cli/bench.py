"""``camshaft bench``: what a plugin measures on this machine, for its own choices."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from camshaft import host
from camshaft.cli.console import say, table
from camshaft.errors import PluginError, RecipeError

COMMAND = "bench"


def register(app: typer.Typer) -> None:
    """Add the command to the root app."""
    settings = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    app.command(COMMAND, context_settings=settings)(bench)


def bench(
    context: typer.Context,
    plugin: Annotated[str, typer.Argument(help="The plugin that measures; without one: those that can.")] = "",
) -> None:
    """Measure what a plugin chooses by on this machine; `camshaft bench PLUGIN --help` shows its options."""
    if plugin in ("", "-h", "--help"):
        if plugin:
            say("Usage: camshaft bench PLUGIN [OPTIONS]...\n\n  Measure what a plugin chooses by on this machine.\n")
        table(("PLUGIN", "OFFERED BY"), [(name, host.distribution(host.installed()[name])) for name in able()])
        return
    load(plugin)([*context.args])


def able() -> list[str]:
    """Installed plugins that measure something. Those that cannot be loaded are left out."""
    return [name for name, plugin in host.classes() if COMMAND in plugin.commands]


def load(plugin: str) -> Callable[[Sequence[str]], None]:
    """What ``camshaft bench <plugin>`` calls with the words that follow.

    Raises:
        RecipeError: there is no such plugin, or it measures nothing.
        PluginError: its command cannot be imported.
    """
    place = host.plugin_class(plugin).commands.get(COMMAND)
    if place is None:
        raise RecipeError(f"plugin '{plugin}' measures nothing; these do: {', '.join(able())}")
    module, _, name = place.partition(":")
    try:
        found: Callable[[Sequence[str]], None] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise PluginError(plugin, COMMAND, f"{place} cannot be imported: {error}") from error
    return found
