"""``camshaft plugins``: what is installed. The one command that imports plugins which no recipe names."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from camshaft import host
from camshaft.cli.console import say, table
from camshaft.errors import PluginError


def register(app: typer.Typer) -> None:
    app.command("plugins")(plugins)


def plugins(as_json: Annotated[bool, typer.Option("--json", help="One JSON list instead of a table.")] = False) -> None:
    """List the installed plugins: name, distribution and version, and what each is."""
    found = [
        {"name": name, "distribution": host.distribution(point), "about": _about(name)}
        for name, point in host.installed().items()
    ]
    if as_json:
        say(json.dumps(found, indent=2))
    else:
        table(("NAME", "DISTRIBUTION", "WHAT IT IS"), [tuple(row.values()) for row in found])


def _about(name: str) -> str:
    """First line of the docstring of the plugin's module, or of its class; a broken plugin says so."""
    try:
        loaded = host.plugin_class(name)
    except PluginError as error:
        return f"cannot be loaded: {error}"
    module = sys.modules[host.installed()[name].module]
    text = module.__doc__ or vars(loaded).get("__doc__") or ""
    return text.strip().partition("\n")[0]
