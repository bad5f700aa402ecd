"""Types and defaults of pydantic fields in words that a user of YAML knows."""

from __future__ import annotations

import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

WORDS = {int: "integer", float: "number", bool: "true or false", str: "text", Any: "anything", type(None): "null"}
BOUNDS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))


def field_type(field: FieldInfo) -> str:
    """Type of a field with its bounds; "or null" is left out, because the default column shows it."""
    return (words(field.annotation) + bounds(field.metadata)).replace("|", "\\|")


def words(annotation: Any) -> str:
    """A type annotation in words. Blocks are named by their class, which has a table of its own."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return words(arguments[0]) + bounds(arguments[1:])
    if origin in (Union, types.UnionType):
        return " or ".join(words(item) for item in arguments if item is not type(None))
    if origin is Literal:
        return " or ".join(f"`{item}`" for item in arguments)
    if origin in (list, tuple):
        return _sequence(arguments)
    if origin is dict:
        return "block"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"block *{annotation.__name__}*"
    return WORDS.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _sequence(arguments: tuple[Any, ...]) -> str:
    items = [item for item in arguments if item is not Ellipsis]
    if len(items) == 1:
        return f"list of {words(items[0])}"
    return "list of " + ", ".join(words(item) for item in items)


def bounds(metadata: Any) -> str:
    """Bounds that a value has to keep, such as " ≥ 1"."""
    found = []
    for item in metadata:
        if isinstance(item, FieldInfo):
            found.append(bounds(item.metadata).strip())
        found += [f"{sign} {_number(getattr(item, name))}" for name, sign in BOUNDS if hasattr(item, name)]
        if getattr(item, "min_length", None):
            found.append(f"(at least {item.min_length})")
    return "".join(f" {text}" for text in [", ".join(text for text in found if text)] if text)


def _number(value: float) -> str:
    if isinstance(value, int) and value > 2**31 and value & (value - 1) == 0:
        return f"2^{value.bit_length() - 1}"
    return str(value)


def default(field: FieldInfo) -> str:
    """Default as it would stand in a recipe; empty when the field may be left out and nothing stands in for it."""
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    if value is None or isinstance(value, BaseModel):
        return ""
    text = yaml.safe_dump(_plain(value), default_flow_style=True, width=1000)
    return f"`{text.removesuffix('...' + chr(10)).strip()}`"


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def blocks(annotation: Any) -> list[type[BaseModel]]:
    """Classes of the blocks that a type may hold, in order."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for item in get_args(annotation) for found in blocks(item)]
