"""``camshaft new-plugin``: a package to start a plugin from, with tests that pass."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from camshaft import scaffold
from camshaft.cli.console import say


def register(app: typer.Typer) -> None:
    """Add the command to the root app."""
    app.command("new-plugin")(new_plugin)


def new_plugin(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The plugin's name: its key in recipes.")],
    kind: Annotated[str, typer.Option(help=f"One of {', '.join(scaffold.kinds())}.")],
    into: Annotated[Path, typer.Option(help="The folder that the package's own folder is made in.")] = Path(),
    license: Annotated[str, typer.Option(help=f"One of {', '.join(scaffold.LICENSES)}.")] = "apache-2.0",
) -> None:
    """Write a pip-installable package: a working plugin, its conformance test, a recipe, CI and a README."""
    folder = scaffold.write(scaffold.Request(name, kind, license), into)
    say(f"{folder} is a package with a working {kind}. Next:")
    say(f"  pip install --editable {shlex.quote(str(folder))}")
    say(f"  pytest {shlex.quote(str(folder))}")
    say(f"  camshaft train {shlex.quote(str(folder / 'recipe.yaml'))}")
