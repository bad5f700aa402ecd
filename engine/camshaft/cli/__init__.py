"""The command line. ``camshaft --help`` lists every command without importing any of them.

A command lives in a module of its own with a function ``register(app)``; only the module of the command that is
invoked gets imported, so that ``validate`` never pays for what ``train`` needs.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

import typer

from camshaft.cli.streams import announce, secure, silence
from camshaft.errors import CamshaftError, Interrupted, OutOfMemory, RecipeError

COMMANDS = {
    "train": "Train what a recipe describes; starts its own ranks where the recipe asks for several.",
    "validate": "Check a recipe and say everything that is wrong with it.",
    "explain": "Show the values of a recipe, and who set each.",
    "plan": "Show what a run would do: phases, owners, claims and the program, without starting it.",
    "profile": "Record a window of training: time by operation, exposed communication, memory, MFU.",
    "verify": "Prove that a recipe trains what one plain process trains, and name the plugin that does not.",
    "sweep": "Write a sweep over values of a recipe for W&B's agents, or run it here (--local).",
    "plugins": "List the installed plugins.",
    "new-plugin": "Write a package to start a plugin from, with tests that pass.",
    "hooks": "List the hooks, and who implements them in a recipe.",
    "schema": "Write the JSON Schema of recipes, for editors.",
    "doctor": "Check this machine: torch, CUDA, NCCL, DeepSpeed and the launchers.",
    "data": "Build tokenised datasets.",
    "bench": "Measure what a plugin chooses by on this machine.",
}
HIDDEN = ("trial",)
"""What commands start of their own."""

_MORE_MEMORY = "Free some, raise the limit (ulimit -v), or make the model or batch.micro_batch_size smaller"
_LOCAL_RANK = re.compile(r"--local[-_]rank(=.*)?")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its status."""
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
    """Run one command and return its exit status: see ``camshaft.errors``; 2 too for bad usage, 130 for Ctrl-C."""
    secure()
    words = without_local_rank(argv)
    command = typer.main.get_command(_app(next((word for word in words if not word.startswith("-")), "")))
    try:
        result = command.main(args=words, prog_name="camshaft", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except CamshaftError as error:
        _show(error)
        return error.exit_status
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        # The reader of a pipe has gone (``| head``): nothing is left to say, not even by the interpreter's exit.
        silence(sys.stdout)
        return 1
    except Exception as error:
        if _memory_ran_out(error):
            announce(f"error: memory ran out ({_printable(str(error)) or 'MemoryError'}). {_MORE_MEMORY}", err=True)
            return OutOfMemory.exit_status
        # Typer's usage errors have no importable base class that all supported versions share.
        if not (hasattr(error, "show") and hasattr(error, "exit_code")):
            raise
        error.show()
        return int(error.exit_code)


def without_local_rank(argv: Sequence[str]) -> list[str]:
    """``argv`` without ``--local_rank N``, which launchers prepend; the rank comes from the environment."""
    words: list[str] = []
    rest = iter(argv)
    for word in rest:
        found = _LOCAL_RANK.fullmatch(word)
        if found is None:
            words.append(word)
        elif found.group(1) is None:
            next(rest, None)
    return words


def _app(wanted: str) -> typer.Typer:
    """The application: the wanted command for real, the others by name and help only."""
    app = typer.Typer(
        name="camshaft",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for name in (*COMMANDS, *HIDDEN):
        if name == wanted:
            importlib.import_module(f"camshaft.cli.{name.replace('-', '_')}").register(app)
        elif name in COMMANDS:
            app.command(name, help=COMMANDS[name])(_not_imported)
    return app


def _not_imported() -> None:
    raise AssertionError("the command that is invoked is always imported")


def _version(asked: bool) -> None:
    if asked:
        from camshaft import __version__

        typer.echo(f"camshaft {__version__}")
        raise typer.Exit


def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    """Camshaft trains language models: a small core, and every strategy a plugin."""


def _memory_ran_out(error: Exception) -> bool:
    from camshaft.cli.launch.exits import classify

    return classify(error)[0] == OutOfMemory.exit_status


def _show(error: CamshaftError) -> None:
    """One ``error:`` line for each problem, on standard error, whatever characters a message quotes."""
    head = "stopped" if isinstance(error, Interrupted) else "error"
    lines = [str(problem) for problem in error.problems] if isinstance(error, RecipeError) else [str(error)]
    for line in lines:
        announce(f"{head}: {_printable(line)}", err=True)


def _printable(text: str) -> str:
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text.replace("\n", " "))
