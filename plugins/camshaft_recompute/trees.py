"""Tensors in nested tuples, lists and dicts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor


def tensors(value: Any) -> Iterator[Tensor]:
    """Each of them, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors(each)
    elif isinstance(value, tuple | list):
        for each in value:
            yield from tensors(each)


def mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """A copy of the nest with every tensor changed; named tuples stay named tuples, other objects themselves."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: mapped(each, change) for key, each in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(each, change) for each in value))
    if isinstance(value, tuple | list):
        return type(value)(mapped(each, change) for each in value)
    return value


def address(tensor: Tensor) -> int:
    """Where its storage is: equal for tensors that share one, as long as one of them lives."""
    return tensor.untyped_storage().data_ptr()


def storage_bytes(several: Iterable[Tensor]) -> dict[int, int]:
    """Storage to its bytes, each once."""
    return {address(each): each.untyped_storage().nbytes() for each in several}
