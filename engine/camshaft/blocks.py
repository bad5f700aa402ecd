"""Rectangles of whole parameters one after another in a flat buffer, and the way from there to the whole and back.

Where an axis divides a parameter (tensor parallel), stretches of a rank's rectangle are no stretches of the flattened
whole, but they are stretches of a buffer that has the rectangles in the order of their offsets. Of rectangles that are
whole rows, and of a parameter that nothing divides, that buffer is the flattened whole itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import NamedTuple

from torch import Tensor

from camshaft.parts import Piece
from camshaft.sums import not_disjoint

Shape = tuple[int, ...]


class Stretch(NamedTuple):
    """Elements ``start`` to ``start + length`` of the buffer of parameter ``name``, wherever they lie."""

    name: str
    start: int
    length: int


class Extent(NamedTuple):
    """What a piece is of: a rectangle at ``offset``, ``shape``, of the parameter [``whole``] that ``copies`` hold."""

    whole: Shape
    offset: Shape
    shape: Shape
    copies: int

    @classmethod
    def of(cls, piece: Piece) -> Extent:
        """That of one piece."""
        offset = (0,) * len(piece.shape) if piece.box is None else piece.box.offset
        return cls(piece.whole_shape, offset, piece.shape, piece.copies)


class Blocks:
    """``extents``: name and extent of every piece of any rank."""

    def __init__(self, extents: Iterable[tuple[str, Extent]]) -> None:
        found: dict[str, set[Extent]] = {}
        for name, extent in extents:
            found.setdefault(name, set()).add(extent)
        self._blocks = {name: sorted(own, key=lambda each: each.offset) for name, own in found.items()}
        self.shapes = {name: own[0].whole for name, own in self._blocks.items()}
        self.copies = {name: own[0].copies for name, own in self._blocks.items()}
        self._begins: dict[tuple[str, Shape], int] = {}
        for name, own in self._blocks.items():
            begin = 0
            for extent in own:
                self._begins[name, extent.offset] = begin
                begin += prod(extent.shape)

    def place(self, stretch: Stretch, offset: Shape) -> Stretch:
        """Where in the buffer a stretch of the rectangle at ``offset`` lies."""
        return stretch._replace(start=stretch.start + self._begins[stretch.name, offset])

    def whole(self, name: str, flat: Tensor) -> Tensor:
        """The parameter in its shape, of its buffer: a view where it has whole rows."""
        if self._rows(name):
            return flat.view(self.shapes[name])
        found = flat.new_empty(self.shapes[name])
        for extent in self._blocks[name]:
            found[_rectangle(extent)] = self._block(name, extent, flat)
        return found

    def flat(self, name: str, whole: Tensor) -> Tensor:
        """The buffer of the parameter; a view where it has whole rows."""
        if self._rows(name):
            return whole.reshape(-1)
        found = whole.new_empty(whole.numel())
        for extent in self._blocks[name]:
            self._block(name, extent, found).copy_(whole[_rectangle(extent)])
        return found

    def _block(self, name: str, extent: Extent, flat: Tensor) -> Tensor:
        begin = self._begins[name, extent.offset]
        return flat[begin : begin + prod(extent.shape)].view(extent.shape)

    def _rows(self, name: str) -> bool:
        return all(extent.shape[1:] == extent.whole[1:] for extent in self._blocks[name])


def _rectangle(extent: Extent) -> tuple[slice, ...]:
    return tuple(slice(at, at + size) for at, size in zip(extent.offset, extent.shape, strict=True))


def check_cover(
    shapes: Mapping[str, Shape], tables: Sequence[Sequence[Stretch]], copies: Mapping[str, int] | None = None
) -> None:
    """Every element of every parameter lies on exactly one rank, or on as many as ``copies`` tells.

    Raises:
        RecipeError: names the first parameter of which that is not true.
    """
    found: dict[str, list[tuple[int, int]]] = {name: [] for name in shapes}
    for stretch in (each for table in tables for each in table):
        found[stretch.name] += [(stretch.start, 1), (stretch.start + stretch.length, -1)]
    for name, borders in found.items():
        wanted, depth, end = 1 if copies is None else copies[name], 0, 0
        for at, change in sorted(borders):
            if at > end and depth != wanted:
                times = f"{wanted} times" if wanted > 1 else "once"
                raise not_disjoint(name, f"elements {end} to {at} lie on {depth} ranks, and should lie {times}")
            depth, end = depth + change, at
        if end != prod(shapes[name]):
            raise not_disjoint(name, f"elements from {end} of {prod(shapes[name])} lie nowhere")
