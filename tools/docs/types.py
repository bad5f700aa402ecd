"""Types and defaults of pydantic fields in words that a user of YAML knows."""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

WORDS = {int: "integer", float: "number", bool: "true or false", str: "text", Any: "anything", type(None): "null"}
BOUNDS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))


def field_type(field: FieldInfo) -> str:
    """Type of a field with its bounds; "or null" is left out, because the default column shows it."""
    return (words(field.annotation) + bounds(field.metadata, field.annotation)).replace("|", "\\|")


def words(annotation: Any) -> str:
    """A type annotation in words. Blocks are named by their class, which has a table of its own."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return words(arguments[0]) + bounds(arguments[1:], arguments[0])
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


def bounds(metadata: Iterable[Any], annotation: Any) -> str:
    """Bounds that a value has to keep, such as " ≥ 1"; those that only guard against overflow are left out."""
    items = [inner for item in metadata for inner in (item.metadata if isinstance(item, FieldInfo) else [item])]
    limits = [(sign, getattr(item, name)) for item in items for name, sign in BOUNDS if hasattr(item, name)]
    found = ", ".join(f"{sign} {limit}" for sign, limit in limits if abs(limit) < 2**53)
    least = max((item.min_length for item in items if hasattr(item, "min_length")), default=0)
    most = min((item.max_length for item in items if getattr(item, "max_length", None)), default=0)
    return "".join(f" {text}" for text in (found, _lengths(least, most, annotation is str)) if text)


def _lengths(least: int, most: int, characters: bool) -> str:
    unit = " characters" if characters else ""
    if not least and not most:
        return ""
    if least == most:
        return f"(exactly {least}{unit})"
    if not most:
        return f"(at least {least}{unit})"
    return f"({least} to {most}{unit})"


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
