"""A stretch of a tensor's row-major flattening as boxes of the tensor. No torch.

Files and index hold rectangular boxes, which any other layout can be read from by intersection. A stretch of a tensor
with d dimensions is at most 2d - 1 of them: the rest of a first row, whole rows, the beginning of a last row, and so
on inside those two rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

Place = tuple[int, ...]


def boxes(shape: Place, start: int, length: int) -> Iterator[tuple[Place, Place]]:
    """(offsets, extent) of boxes that cover elements ``start`` to ``start + length``, in row-major order.

    Each box is contiguous in the flattening too. An empty tensor is one empty box; an empty stretch of another, none.
    """
    if length == prod(shape):
        yield (0,) * len(shape), shape
    elif length and len(shape) == 1:
        yield (start,), (length,)
    elif length:
        yield from _rows(shape, start, length)


def _rows(shape: Place, start: int, length: int) -> Iterator[tuple[Place, Place]]:
    inner = shape[1:]
    row = prod(inner)
    number, skip = divmod(start, row)
    if skip:
        head = min(row - skip, length)
        yield from _within(number, inner, skip, head)
        number, length = number + 1, length - head
    rows, tail = divmod(length, row)
    if rows:
        yield (number, *(0,) * len(inner)), (rows, *inner)
    if tail:
        yield from _within(number + rows, inner, 0, tail)


def _within(number: int, inner: Place, start: int, length: int) -> Iterator[tuple[Place, Place]]:
    for offsets, extent in boxes(inner, start, length):
        yield (number, *offsets), (1, *extent)
