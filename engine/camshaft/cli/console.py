"""What commands share: their common parameters, and plain output that can be searched and piped."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from camshaft.cli.streams import silence
from camshaft.errors import MachineError

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False)]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, for example training.max_steps=100.", show_default=False),
]
WorldSizeOption = Annotated[
    int | None,
    typer.Option(
        "--world-size", min=1, max=2**20, help="Number of processes; default: launch.processes of the recipe."
    ),
]


def say(text: str = "") -> None:
    """Write a line to standard output.

    Raises:
        BrokenPipeError: nobody reads any more.
        MachineError: standard output cannot be written for another reason, a full disk for example.
    """
    try:
        typer.echo(text)
    except BrokenPipeError:
        raise
    except OSError as error:
        silence(sys.stdout)
        raise MachineError(f"standard output cannot be written: {error.strerror}") from error


def warn(text: str) -> None:
    """Write a line to standard error."""
    typer.echo(text, err=True)


def columns(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns as text; the last one is as wide as it needs. Headers are left out when empty."""
    lines = [list(headers), *map(list, rows)] if headers else [list(row) for row in rows]
    if not lines:
        return ""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in padded)


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write aligned columns, if there are any."""
    text = columns(headers, rows)
    if text:
        say(text)
