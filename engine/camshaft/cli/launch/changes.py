"""What differs between the recipe that a run directory began with and the one that continues it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from camshaft.recipe import emit
from camshaft.recipe.nodes import join

if TYPE_CHECKING:
    from camshaft.recipe import Resolved

_MOST = 8
_ABSENT = object()
_ELSEWHERE = "run"  # where a run is kept does not change what it is


def since_the_start(kept: Path, resolved: Resolved) -> list[str]:
    """A line for each value that is not as in ``kept``, the ``resolved.yaml`` of the first start; at most 9 lines.

    Empty where there is no such file, or none that can be read.
    """
    try:
        before = yaml.safe_load(kept.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return []
    now = yaml.safe_load(resolved.dump())  # by the same reader, so that only values can differ
    if not isinstance(before, dict) or not isinstance(now, dict):
        return []
    found = [f"changed since the run began: {text}" for text in _differences(before, now, "")]
    more = len(found) - _MOST
    return found if more <= 0 else [*found[:_MOST], f"and {more} more changed since the run began; see {kept}"]


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name in dict.fromkeys((*before, *now)):
        key = join(prefix, name)
        old, new = before.get(name, _ABSENT), now.get(name, _ABSENT)
        if key == _ELSEWHERE:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, key)
        elif not _same(old, new):
            yield f"{key} {_shown(old)} -> {_shown(new)}"
    common = [name for name in before if name in now]
    order = [name for name in now if name in before]
    if prefix == "plugins" and common != order:  # plugins act in the order of their sections
        yield f"order of plugins {', '.join(map(str, common))} -> {', '.join(map(str, order))}"


def _same(old: Any, new: Any) -> bool:
    return bool(old == new) and isinstance(old, bool) == isinstance(new, bool)


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "(not set)"
    return value if isinstance(value, str) and value else emit.flow(value)  # 1e-06 is text to this reader
