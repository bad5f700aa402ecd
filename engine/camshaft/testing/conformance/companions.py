"""Plugins that a trial recipe needs besides the one under test, found among those that came with Camshaft."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any, Literal, get_args, get_origin

from camshaft.hookspecs import SLOTS
from camshaft.host import distribution, installed, plugin_class

STEP = 1e-3
"""Value of a number that a plugin's options require (a learning rate)."""


@cache
def shipped() -> tuple[str, ...]:
    """Names of installed plugins that came with Camshaft itself."""
    points = installed()
    return tuple(name for name, point in points.items() if distribution(point).partition(" ")[0] == "camshaft")


def slots(names: Iterable[str]) -> frozenset[str]:
    """Slots that any of the plugins owns."""
    return frozenset(slot for name in names for slot in SLOTS if hasattr(plugin_class(name), slot))


@cache
def least(name: str) -> Mapping[str, Any]:
    """A section for plugin ``name`` with the options that it requires, and no others.

    Raises:
        ValueError: it requires something else than a number.
    """
    found: dict[str, Any] = {}
    for key, option in plugin_class(name).Options.model_fields.items():
        if option.is_required():
            if option.annotation not in (float, int):
                raise ValueError(f"plugin '{name}' requires '{key}', for which there is no usual value")
            found[key] = STEP if option.annotation is float else 1
    return found


def sections(name: str) -> Iterator[Mapping[str, Any]]:
    """Sections to try plugin ``name`` with: ``least``, then each choice of one option, the last of its words first.

    Raises:
        ValueError: see ``least``.
    """
    yield least(name)
    for key, option in plugin_class(name).Options.model_fields.items():
        for part in (option.annotation, *get_args(option.annotation)):
            if get_origin(part) is Literal:
                yield from ({**least(name), key: value} for value in reversed(get_args(part)))
