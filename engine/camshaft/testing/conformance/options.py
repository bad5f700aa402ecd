"""The blocks of a plugin's section: each must refuse keys that it does not know."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel


def open_blocks(options: type[BaseModel]) -> list[str]:
    """Names of the blocks of ``options``, itself among them, that take unknown keys or can be changed when read."""
    return sorted(
        block.__name__
        for block in set(_blocks(options))
        if block.model_config.get("extra") != "forbid" or not block.model_config.get("frozen")
    )


def _blocks(block: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield block
    for field in block.model_fields.values():
        for inner in _models(field.annotation):
            yield from _blocks(inner)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)
