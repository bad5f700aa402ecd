"""Which part of what one process has a rank's tensor is: told by its shape and, where that is not enough, by whether
ranks have the same numbers in it, which they ask one another once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from camshaft_tensor_parallel.line import Line


class Unclear(Exception):
    """Nobody can tell which part a tensor is; the text says why."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where module ``name`` works: inside of a region, on features or heads of this rank, or between regions.

    ``heads``: how many heads a rank may have there, where products are cut between them; None: nobody said.
    """

    name: str
    inside: bool
    heads: frozenset[int] | None = None
    told: bool = False
    """Whether the plan itself says that what comes is divided."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """This rank's tokens [1, m, ...] of [b, s, ...]; the last ranks' may end with padding."""

    line: Line

    def blank(self, own: Tensor, value: float) -> Tensor:
        """What all ranks have, full of ``value``."""
        return own.new_full((self.line.rows, self.line.length, *own.shape[2:]), value)

    def take(self, whole: Tensor) -> Tensor:
        """This rank's part, in memory of its own; padding is 0."""
        line = self.line
        own = whole.flatten(0, 1)[line.rank * line.share : (line.rank + 1) * line.share]
        return torch.cat((own, own.new_zeros(line.share - len(own), *own.shape[1:]))).unsqueeze(0)

    def put(self, own: Tensor) -> Tensor:
        """What all ranks have, with ``own`` in its place and zeros elsewhere; its gradient comes back."""
        line, flat = self.line, own.squeeze(0)
        before, behind = (
            flat.new_zeros(count * line.share, *flat.shape[1:]) for count in (line.rank, line.size - line.rank - 1)
        )
        whole = torch.cat((before, flat, behind))[: line.rows * line.length]
        return whole.view(line.rows, line.length, *own.shape[2:])


@dataclass(frozen=True, slots=True)
class Stretch:
    """``width`` places from ``start`` on, of ``total`` along ``dimension``."""

    dimension: int
    start: int
    width: int
    total: int

    def blank(self, own: Tensor, value: float) -> Tensor:
        """What all ranks have, full of ``value``, with dimensions in memory as those of ``own``: torch draws so."""
        shape = (*own.shape[: self.dimension], self.total, *own.shape[self.dimension + 1 :])
        return _ordered(own.new_full(shape, value), own)

    def take(self, whole: Tensor) -> Tensor:
        """This rank's part, in memory of its own."""
        return whole.narrow(self.dimension, self.start, self.width).clone(memory_format=torch.contiguous_format)

    def put(self, own: Tensor) -> Tensor:
        """What all ranks have, with ``own`` in its place and zeros elsewhere; its gradient comes back."""
        head, tail = own.shape[: self.dimension], own.shape[self.dimension + 1 :]
        before, behind = (
            own.new_zeros(*head, count, *tail) for count in (self.start, self.total - self.start - self.width)
        )
        return _ordered(torch.cat((before, own, behind), self.dimension), own)


def _ordered(whole: Tensor, own: Tensor) -> Tensor:
    """``whole`` with its dimensions in memory as those of ``own``; one of a single place is inside of its equals."""
    order = sorted(range(own.ndim), key=lambda each: (-own.stride()[each], own.shape[each] == 1))
    back = sorted(range(own.ndim), key=order.__getitem__)
    return whole.permute(order).contiguous().permute(back)


Share = Tokens | Stretch | None
"""None: the tensor is whole, and the same on all ranks."""


@dataclass(slots=True)
class Shares:
    """What was found, by call: module, number of the call in its forward, operation and shape."""

    line: Line
    _known: dict[tuple[object, ...], Share] = field(default_factory=dict)

    def of_shape(self, shape: tuple[int, ...], place: Place) -> Share:
        """Of memory that has no values yet.

        Raises:
            Unclear: the shape alone does not tell.
        """
        line = self.line
        if line.sequence and shape[:2] == (1, line.share):
            return Tokens(line)
        if not shape or (place.inside and shape[0] in (1, line.rows) and set(shape[1:]) <= {1}):
            return None
        if not place.inside and (not line.sequence or shape[:2] == (line.rows, line.length)):
            return None
        if place.inside:
            raise Unclear("its shape does not tell whether it is divided")
        raise Unclear(f"it is neither a rank's tokens [1, {line.share}, ...] nor all [{line.rows}, {line.length}, ...]")

    def of(self, own: Tensor, place: Place, call: tuple[object, ...]) -> Share:
        """Of a tensor with values. All ranks call this; the first time they exchange a few numbers.

        Raises:
            Unclear: as it says.
        """
        shape = tuple(own.shape)
        if not shape:
            return None
        if self.line.sequence and shape[:2] == (1, self.line.share):
            if not own.is_contiguous():
                raise Unclear("its memory is in an order of its own, in which torch would draw")
            return Tokens(self.line)
        key = (place.name, *call, shape)
        if key not in self._known:
            self._known[key] = self._found(own.detach(), place)
        return self._known[key]

    def _found(self, own: Tensor, place: Place) -> Share:
        if not place.inside:
            self.of_shape(tuple(own.shape), place)
        numbers = self._numbers(own)
        if len(set(numbers)) == 1:
            if not place.inside or bool(own.amin() != own.amax()):
                return None
            if not place.told:
                raise Unclear("all ranks have one and the same number in all of it, so nobody sees what is divided")
            numbers = [(float(rank),) for rank in range(self.line.size)]
        elif not place.inside:
            raise Unclear("ranks have other numbers in it, so each has a part of it, outside of every region")
        dimension = self._dimension(tuple(own.shape), place)
        return self._stretch(dimension, own, numbers)

    def _dimension(self, shape: tuple[int, ...], place: Place) -> int:
        """Along which ``shape`` of a rank's features or heads is divided."""
        batch = (self.line.rows, self.line.length)
        if len(shape) == 3 and shape[:2] == batch:
            return 2
        if len(shape) == 4 and shape[0] == batch[0] and place.heads is None:
            raise Unclear("nobody says how many heads a rank has: give the region's products their style as column:64")
        if len(shape) == 4 and shape[0] == batch[0] and place.heads is not None:
            fitting = [
                dimension
                for dimension, other in ((1, 2), (2, 1))
                if shape[dimension] in place.heads and shape[other] == batch[1]
            ]
            if len(fitting) == 1:
                return fitting[0]
        raise Unclear(f"its dimensions are not clearly {list(batch)} and a rank's features or heads")

    def _numbers(self, own: Tensor) -> list[tuple[float, ...]]:
        """For each rank some sums, which are equal where the tensor is."""
        line = self.line
        sums = torch.zeros(line.size, 2, dtype=torch.float64, device=own.device)
        sums[line.rank, 0] = own.sum(dtype=torch.float64)
        sums[line.rank, 1] = own[..., ::2].sum(dtype=torch.float64)
        return [tuple(each) for each in line.all_reduce(sums, "forward").tolist()]

    def _stretch(self, dimension: int, own: Tensor, numbers: Sequence[object]) -> Stretch:
        """Ranks have their parts in order; neighbours may have the same one (key/value heads)."""
        line = self.line
        firsts = [rank for rank in range(line.size) if rank == 0 or numbers[rank] != numbers[rank - 1]]
        if len(firsts) > len(set(numbers)):
            raise Unclear("ranks that are no neighbours have the same part of it")
        widths = torch.zeros(line.size, dtype=torch.int64, device=own.device)
        widths[line.rank] = own.shape[dimension]
        found: list[int] = line.all_reduce(widths, "forward").tolist()
        mine = max(first for first in firsts if first <= line.rank)
        start, total = sum(found[first] for first in firsts if first < mine), sum(found[first] for first in firsts)
        return Stretch(dimension, start, own.shape[dimension], total)
