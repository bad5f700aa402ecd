"""What there is to document: every hook with its kind, and every plugin of this repository. Imports no torch."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from camshaft import Plugin
from camshaft.hookspecs import FAMILIES
from camshaft.host import GROUP
from camshaft.plugin import PROJECT

MARK = f"{PROJECT}_impl"  # what @hookimpl leaves on a function
KINDS = ("collected", "slot", "chain", "event", "middleware")
PLUGINS = Path(__file__).resolve().parents[2] / "plugins"


@dataclass(frozen=True)
class Hook:
    """One hook specification, taken apart. ``text`` is its docstring without kind and version."""

    name: str
    family: type
    kind: str
    kind_text: str
    since: int
    text: str
    arguments: tuple[str, ...]
    signature: str


@cache
def hooks() -> tuple[Hook, ...]:
    """Every hook in run order, which is the order of their definition."""
    return tuple(
        _hook(family, name, function)
        for family in FAMILIES
        for name, function in vars(family).items()
        if inspect.isfunction(function)
    )


def _hook(family: type, name: str, function: Callable[..., Any]) -> Hook:
    text = inspect.getdoc(function) or ""
    kind_text, _, rest = text.partition(".")
    kind = re.split(r"\W", kind_text.lower(), maxsplit=1)[0]
    since = re.search(r"\s*Since (?:hook )?API (\d+)\.", rest)
    if kind not in KINDS or since is None:
        raise ValueError(f"hook '{name}': the docstring must begin with its kind and say 'Since hook API n.'")
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())[1:]
    shown = ", ".join(["self", *(f"{item.name}: {item.annotation}" for item in parameters)])
    return Hook(
        name=name,
        family=family,
        kind=kind,
        kind_text=kind_text,
        since=int(since[1]),
        text=(rest[: since.start()] + rest[since.end() :]).strip(),
        arguments=tuple(item.name for item in parameters),
        signature=f"def {name}({shown}) -> {signature.return_annotation}",
    )


@dataclass(frozen=True)
class Shipped:
    """One plugin of this repository."""

    name: str
    plugin: type[Plugin]
    summary: str
    hooks: tuple[str, ...]


@cache
def plugins() -> tuple[Shipped, ...]:
    """Every plugin that has a folder here and is installed, by name. Third-party ones are left out."""
    folders = {path.name for path in PLUGINS.iterdir() if (path / "__init__.py").exists()}
    found = (point for point in entry_points(group=GROUP) if point.module in folders)
    return tuple(_shipped(point) for point in sorted(found, key=lambda point: point.name))


def _shipped(point: EntryPoint) -> Shipped:
    plugin: type[Plugin] = point.load()
    text = inspect.getdoc(importlib.import_module(point.module)) or ""
    sentence = re.split(r"\.\s+(?=[A-Z`])", " ".join(text.split("\n\n")[0].split()), maxsplit=1)[0]
    implemented = tuple(hook.name for hook in hooks() if hasattr(getattr(plugin, hook.name, None), MARK))
    return Shipped(point.name, plugin, sentence.rstrip("."), implemented)


def implementers(hook: str) -> list[str]:
    """Names of the shipped plugins that implement ``hook``."""
    return [shipped.name for shipped in plugins() if hook in shipped.hooks]
