"""``camshaft schema``: one JSON Schema out of the core and all installed plugins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from camshaft.cli.console import say
from camshaft.errors import MachineError
from camshaft.recipe.json_schema import build


def register(app: typer.Typer) -> None:
    app.command("schema")(schema)


def schema(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write to this file.", show_default=False)
    ] = None,
) -> None:
    """Write the JSON Schema (draft 7) of recipes, for editors: completion, descriptions and checks while typing."""
    text = json.dumps(build(), indent=2) + "\n"
    if output is None:
        say(text.rstrip())
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise MachineError(f"{output} cannot be written: {error.strerror}") from error
