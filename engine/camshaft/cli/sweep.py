"""``camshaft sweep``: a sweep for W&B's agents, or run here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from camshaft.cli.console import say
from camshaft.cli.streams import announce
from camshaft.errors import MachineError, RecipeError


def register(app: typer.Typer) -> None:
    """Add the command to the root app."""
    app.command("sweep")(sweep)


def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP", help="The sweep, a YAML file.", show_default=False)],
    local: Annotated[bool, typer.Option("--local", help="Run it here with Optuna, one trial after the other.")] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Where the file for W&B goes; default: <SWEEP>.wandb.yaml beside it."),
    ] = None,
) -> None:
    """Write a sweep for W&B's agents, or run it here without network; the same command continues one that was killed.

    Exit status: 0; 1 if no trial came to a value; 2 sweep or recipe; 3 machine; 130 stopped.
    """
    from camshaft.sweep.file import read

    found = read(file)
    if local:
        from camshaft.cli.launch.watch import StopSignal
        from camshaft.sweep.local import run

        stop = StopSignal(grace_s=None, repeat_ends=False).install()
        try:
            run(found, stop, announce)
        finally:
            stop.uninstall()
        return
    from camshaft.sweep.agents import is_ours, text

    target = output or file.with_suffix(".wandb.yaml")
    content = text(found, str(target))
    try:
        if target.exists() and not is_ours(target):
            raise RecipeError(f"{target} exists and is no sweep for W&B's agents: give another name with --output")
        target.write_text(content, encoding="utf-8")
    except OSError as error:
        raise MachineError(f"{target} cannot be written: {error.strerror}. Give another with --output") from error
    say(f"written      {target}")
    say(f"next         wandb sweep {target}")
