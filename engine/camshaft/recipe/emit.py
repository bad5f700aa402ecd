"""A resolved recipe as YAML that reads back to the same recipe, with who set each value beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from camshaft.recipe import scalars
from camshaft.recipe.nodes import Origin, join

_PLAIN = re.compile(r"[A-Za-z_./][A-Za-z0-9_./-]*")
_ESCAPED = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")
_COLUMN = 48


def emit(tree: Mapping[str, Any], provenance: Mapping[str, Origin], notes: Mapping[str, str]) -> str:
    """``tree`` as YAML; ``notes`` are added to the comments of their keys."""
    return "".join(f"{line}\n" for line in _mapping(tree, "", 0, provenance, notes))


def _mapping(
    tree: Mapping[str, Any], prefix: str, indent: int, provenance: Mapping[str, Origin], notes: Mapping[str, str]
) -> Iterator[str]:
    for name, value in tree.items():
        key = join(prefix, name)
        head = f"{' ' * indent}{scalar(name)}:"
        if isinstance(value, dict) and value:
            yield head
            yield from _mapping(value, key, indent + 2, provenance, notes)
            continue
        comment = "; ".join(str(part) for part in (provenance.get(key), notes.get(key)) if part)
        yield f"{head} {flow(value)}".ljust(_COLUMN) + (f"  # {comment}" if comment else "")


def flow(value: Any) -> str:
    """A value on one line, as the recipe's YAML would give it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{scalar(key)}: {flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(flow(item) for item in value) + "]"
    return scalar(value)


def scalar(value: Any) -> str:
    """A scalar, quoted only where YAML would read something else."""
    if isinstance(value, str):
        if _PLAIN.fullmatch(value) and isinstance(scalars.resolve(value), str):
            return value
        return _ESCAPED.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(value, ensure_ascii=False))
    return "null" if value is None else json.dumps(value)
