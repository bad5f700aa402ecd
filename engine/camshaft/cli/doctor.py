"""``camshaft doctor``: what this machine can do for a run, and what is missing."""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import typer

from camshaft import host
from camshaft.cli import inventory
from camshaft.cli.console import say, table
from camshaft.errors import MachineError

Grade = Literal["ok", "note", "missing"]
_OLDEST_PYTHON = (3, 11)
COMMAND = "doctor"
"""What a plugin calls its own checks in ``Plugin.commands``."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at, what was found, and whether a run can do without it."""

    grade: Grade
    what: str
    found: str


def register(app: typer.Typer) -> None:
    """Add the command to the root app."""
    app.command("doctor")(doctor)


def doctor() -> None:
    """Check this machine: torch, CUDA, NCCL, launchers, rendezvous, cache, and what plugins need.

    Exit status 3 if something is missing that every run needs.
    """
    found = list(findings())
    table((), [(finding.grade, finding.what, finding.found) for finding in found])
    missing = [finding.what for finding in found if finding.grade == "missing"]
    if missing:
        raise MachineError(f"missing what every run needs: {', '.join(missing)}")
    say("nothing essential is missing")


def findings() -> Iterator[Finding]:
    """Every check in turn. One that raises is a finding too, not the end of the others."""
    for what, check in CHECKS.items():
        try:
            grade, text = check()
        except Exception as error:  # a broken package may raise anything at import
            grade, text = "missing", f"{type(error).__name__}: {error}"
        yield Finding(grade, what, text)
    for name, plugin in host.classes():
        if COMMAND in plugin.commands:
            yield from _asked(name, plugin.commands[COMMAND])


def _asked(name: str, place: str) -> Iterator[Finding]:
    """What a plugin finds. No run of every recipe needs it, so that nothing of it is essential."""
    module, _, function = place.partition(":")
    try:
        for fine, what, text in getattr(importlib.import_module(module), function)():
            yield Finding("ok" if fine else "note", what, text)
    except Exception as error:
        yield Finding("note", name, f"{type(error).__name__}: {error}")


def _python() -> tuple[Grade, str]:
    supported = sys.version_info[:2] >= _OLDEST_PYTHON
    return "ok" if supported else "missing", sys.version.split()[0]


def _torch() -> tuple[Grade, str]:
    import torch

    return "ok", str(torch.__version__)


def _cuda() -> tuple[Grade, str]:
    import torch

    if torch.version.cuda is None:
        return "note", "torch is built without CUDA: runs use the CPU"
    names = inventory.gpus()
    if not names:
        return "note", f"torch has CUDA {torch.version.cuda} and sees no GPU: runs use the CPU"
    return "ok", f"{torch.version.cuda}, {len(names)} GPU(s): {', '.join(sorted(set(names)))}"


def _nccl() -> tuple[Grade, str]:
    import torch.distributed as dist

    found = inventory.cuda_versions()["nccl"]
    if dist.is_nccl_available() and found:
        return "ok", found
    return "note", "not usable here; ranks on a CPU use gloo"


def _gloo() -> tuple[Grade, str]:
    import torch.distributed as dist

    available = dist.is_available() and dist.is_gloo_available()
    return ("ok", "available") if available else ("missing", "torch is built without gloo")


def _deepspeed() -> tuple[Grade, str]:
    found = inventory.version("deepspeed")
    return ("ok", found) if found else ("note", "not installed: set launch.launcher=torchrun")


def _launchers() -> tuple[Grade, str]:
    from camshaft.cli.launch.commands import find_tool

    tools = {name: find_tool(name) for name in ("deepspeed", "torchrun")}
    found = [f"{name} ({tool[0]})" for name, tool in tools.items() if tool]
    if not found:
        return "missing", "neither deepspeed nor torchrun found: only one process can train"
    absent = [name for name, tool in tools.items() if not tool]
    return ("note" if absent else "ok"), ", ".join(found) + (f"; not found: {', '.join(absent)}" if absent else "")


def _rendezvous() -> tuple[Grade, str]:
    """Two ranks meet as those of a run do: in a file, over loopback alone."""
    from camshaft.cli.launch.probe import two_ranks_meet

    with tempfile.TemporaryDirectory(prefix="camshaft-") as folder:
        error = two_ranks_meet(Path(folder))
    return ("missing", error) if error else ("ok", "two ranks met over loopback")


def _cache() -> tuple[Grade, str]:
    from camshaft.data.cache import folder

    place = folder(None, os.environ)
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=place):
        return "ok", str(place)


CHECKS: dict[str, Callable[[], tuple[Grade, str]]] = {
    "python": _python,
    "torch": _torch,
    "cuda": _cuda,
    "nccl": _nccl,
    "gloo": _gloo,
    "deepspeed": _deepspeed,
    "launchers": _launchers,
    "rendezvous": _rendezvous,
    "cache": _cache,
}
