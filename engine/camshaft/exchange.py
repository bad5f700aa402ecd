"""Whole parameters for a moment, where ranks hold only pieces of them (``whole_parameters``).

Each parameter has an owner rank. Rounds of bounded size bring pieces to the owners, and results back, each by one
all-to-all that runs while the caller does something else. Works under any owner of storage whose pieces are disjoint
along ``parts.channel``, also where an axis divides the parameters themselves: then every rank that holds a copy of a
piece sends it, and gets the result. Without any nothing travels, and what lies in one piece is not copied.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from camshaft.blocks import Blocks, Extent, Shape, Stretch, check_cover
from camshaft.comm import Pending
from camshaft.parts import Part, Parts, Piece
from camshaft.sums import refuse_dtensors

SLACK = 1.05
"""How much more than the mean an owner may get, to save the journey of a parameter that it holds already."""


class Held(NamedTuple):
    """A piece that this rank holds, and the part that it lies in."""

    part: Part
    piece: Piece

    def of(self, values: Tensor) -> Tensor:
        """The piece's stretch of ``values``, laid out as the part's tensor: 1-D, a view where they are contiguous."""
        return values.reshape(-1)[self.piece.place : self.piece.place + self.piece.length]


@dataclass(frozen=True, slots=True)
class Round:
    """Parameters that are whole at the same time.

    ``places``: of this rank's pieces in the exchange's list. ``outgoing``: for each rank, positions in ``places`` of
    what it owns. ``incoming``: for each rank, what it holds of what this rank owns. Neither has an entry for this rank.
    ``travels``: whether any rank sends anything; equal on all.
    """

    names: frozenset[str]
    places: tuple[int, ...]
    outgoing: tuple[tuple[int, ...], ...]
    incoming: tuple[tuple[Stretch, ...], ...]
    travels: bool


class Arriving:
    """Whole parameters on their way to their owner."""

    def __init__(self, pending: Pending | None, unpack: Callable[[], dict[str, Tensor]]) -> None:
        self._pending, self._unpack = pending, unpack

    def wait(self) -> dict[str, Tensor]:
        """By name, each in its own shape: those that this rank owns. Call it once."""
        if self._pending is not None:
            self._pending.wait()
        return self._unpack()


class Departing:
    """Results on their way to the holders of the pieces."""

    def __init__(self, values: list[Tensor], pending: Pending | None) -> None:
        self._values, self._pending = values, pending

    def wait(self) -> list[Tensor]:
        """One 1-D tensor for each of the round's held pieces, in their order. Call it once."""
        if self._pending is not None:
            self._pending.wait()
        return self._values


class Exchange:
    """Brings the pieces of each parameter of ``names`` to its owner, and what the owner makes of them back.

    Owners are the same on every rank: ``cost`` (of a shape) is spread evenly, and where that leaves a choice the rank
    that holds most of a parameter gets it. ``dtype`` is what travels, on ``device``. ``limit``: elements of whole
    parameters that a rank owns in one round, or one larger parameter; None: all in one round.

    Collective: all ranks of ``parts.holders`` construct it, and run the same rounds in the same order. Traffic of a
    round, each way: what lies on another rank than its owner's.

    Raises:
        RecipeError: pieces overlap, leave out elements, or a part is a DTensor.
    """

    def __init__(
        self,
        parts: Parts,
        names: Collection[str],
        dtype: torch.dtype,
        device: torch.device,
        *,
        cost: Callable[[Shape], float] = prod,
        limit: int | None = None,
    ) -> None:
        refuse_dtensors(parts)
        self._parts, self._names = parts, frozenset(names)
        self._dtype, self._device = dtype, device
        self._rank = 0 if parts.holders is None else parts.holders.rank
        self._version, self._held = parts.version, self._look_up()
        self._blocks, self._tables = self._learn()
        self.shapes = self._blocks.shapes
        self._stretches = self._tables[self._rank]
        check_cover(self.shapes, self._tables, self._blocks.copies)
        self.owners = assign(self.shapes, self._tables, cost)
        self.rounds = tuple(self._round(names) for names in batches(self.shapes, self.owners, limit))

    def held(self, current: Round) -> list[Held]:
        """This rank's pieces of the round's parameters, in the order of values and results."""
        if self._version != self._parts.version:  # a split changes neither their order nor their extent
            fresh = self._look_up()
            assert list(map(_stretch, fresh)) == list(map(_stretch, self._held)), "a split moved elements"
            self._version, self._held = self._parts.version, fresh
        return [self._held[place] for place in current.places]

    @torch.no_grad()
    def to_owners(self, current: Round, values: Sequence[Tensor], hook: str = "step") -> Arriving:
        """Start bringing ``values`` to the owners: 1-D, in the exchange's dtype, one for each of ``held(current)``.

        A parameter that lies in one piece on its owner arrives as a view of its value.
        """
        whole = self._rooms(current, values)

        def shaped() -> dict[str, Tensor]:
            return {name: self._blocks.whole(name, flat) for name, flat in whole.items()}

        if not current.travels:
            return Arriving(None, shaped)
        sources = [self._joined([values[place] for place in places]) for places in current.outgoing]
        lengths = [[stretch.length for stretch in of_rank] for of_rank in current.incoming]
        outputs = [self._empty(sum(each)) for each in lengths]

        def unpack() -> dict[str, Tensor]:
            for stretches, sizes, received in zip(current.incoming, lengths, outputs, strict=True):
                for stretch, flat in zip(stretches, torch.split(received, sizes), strict=True):
                    _cut(whole, stretch).copy_(flat)
            return shaped()

        return Arriving(self._all_to_all(outputs, sources, hook), unpack)

    @torch.no_grad()
    def from_owners(self, current: Round, whole: Mapping[str, Tensor], hook: str = "step") -> Departing:
        """Start bringing ``whole`` (each parameter of the round that this rank owns) back to the pieces.

        Results for pieces of what this rank owns are views of ``whole``.
        """
        flats = {name: self._blocks.flat(name, tensor) for name, tensor in whole.items()}
        own = [self._stretches[place] for place in current.places]
        results = [_cut(flats, stretch) if stretch.name in flats else self._empty(0) for stretch in own]
        if not current.travels:
            return Departing(results, None)
        sources = [self._joined([_cut(flats, stretch) for stretch in of_rank]) for of_rank in current.incoming]
        outputs = []
        for positions in current.outgoing:
            sizes = [own[position].length for position in positions]
            outputs.append(self._empty(sum(sizes)))
            for position, flat in zip(positions, torch.split(outputs[-1], sizes), strict=True):
                results[position] = flat
        return Departing(results, self._all_to_all(outputs, sources, hook))

    def _rooms(self, current: Round, values: Sequence[Tensor]) -> dict[str, Tensor]:
        """Buffers of what this rank owns, its own pieces in place."""
        own = [self._stretches[place] for place in current.places]
        whole: dict[str, Tensor] = {}
        mine = {name for name in current.names if self.owners[name] == self._rank}
        for stretch, value in zip(own, values, strict=True):
            if stretch.name in mine and stretch.length == prod(self.shapes[stretch.name]):
                whole[stretch.name] = value
        for name in sorted(mine - whole.keys()):
            whole[name] = self._empty(prod(self.shapes[name]))
        for stretch, value in zip(own, values, strict=True):
            if stretch.name in mine and whole[stretch.name] is not value:
                _cut(whole, stretch).copy_(value)
        return {name: whole[name] for name in sorted(mine)}

    def _all_to_all(self, outputs: list[Tensor], sources: list[Tensor], hook: str) -> Pending:
        assert self._parts.holders is not None
        return self._parts.holders.all_to_all(outputs, sources, hook)

    def _empty(self, size: int) -> Tensor:
        return torch.empty(size, dtype=self._dtype, device=self._device)

    def _joined(self, tensors: list[Tensor]) -> Tensor:
        return torch.cat(tensors) if tensors else self._empty(0)

    def _look_up(self) -> list[Held]:
        found = (Held(part, piece) for part in self._parts for piece in part.pieces)
        return [each for each in found if each.piece.name in self._names and each.piece.length]

    def _learn(self) -> tuple[Blocks, list[list[Stretch]]]:
        """What each rank holds, in the order of its parts. Asked once, for splits do not change it."""
        own = [(_stretch(held), Extent.of(held.piece)) for held in self._held]
        everyone = [own]
        holders = self._parts.holders
        if holders is not None and holders.size > 1:
            everyone = [[] for _ in range(holders.size)]
            dist.all_gather_object(everyone, own, group=holders.group)
        blocks = Blocks((stretch.name, extent) for table in everyone for stretch, extent in table)
        return blocks, [[blocks.place(stretch, extent.offset) for stretch, extent in table] for table in everyone]

    def _round(self, names: frozenset[str]) -> Round:
        places = tuple(place for place, held in enumerate(self._held) if held.piece.name in names)
        owner_of = [self.owners[self._held[place].piece.name] for place in places]
        others = [None if rank == self._rank else rank for rank in range(len(self._tables))]
        tables = [[stretch for stretch in table if stretch.name in names] for table in self._tables]
        return Round(
            names,
            places,
            tuple(tuple(at for at, owner in enumerate(owner_of) if owner == rank) for rank in others),
            tuple(
                () if rank is None else tuple(each for each in tables[rank] if self.owners[each.name] == self._rank)
                for rank in others
            ),
            any(self.owners[each.name] != rank for rank, table in enumerate(tables) for each in table),
        )


def _stretch(held: Held) -> Stretch:
    """In the coordinates of the piece's own rectangle."""
    return Stretch(held.piece.name, held.piece.start, held.piece.length)


def _cut(flats: Mapping[str, Tensor], of: Stretch) -> Tensor:
    return flats[of.name][of.start : of.start + of.length]


def assign(
    shapes: Mapping[str, Shape], tables: Sequence[Sequence[Stretch]], cost: Callable[[Shape], float]
) -> dict[str, int]:
    """Owner of each parameter, the most costly first.

    A rank may get up to ``SLACK`` times the mean; of those that can take a parameter the one that holds most of it gets
    it, then the one with the least to do. Where none can, the one with the least to do.
    """
    share: dict[str, list[int]] = {name: [0] * len(tables) for name in shapes}
    for rank, table in enumerate(tables):
        for stretch in table:
            share[stretch.name][rank] += stretch.length
    costs = {name: cost(shape) for name, shape in shapes.items()}
    most = SLACK * sum(costs.values()) / len(tables)
    loads, owners = [0.0] * len(tables), dict[str, int]()
    for name in sorted(shapes, key=lambda name: (-costs[name], name)):
        able = [rank for rank, load in enumerate(loads) if load + costs[name] <= most]
        able = able or [rank for rank, load in enumerate(loads) if load == min(loads)]
        owners[name] = max(able, key=lambda rank: (share[name][rank], -loads[rank], -rank))
        loads[owners[name]] += costs[name]
    return owners


def batches(shapes: Mapping[str, Shape], owners: Mapping[str, int], limit: int | None) -> list[frozenset[str]]:
    """Names of each round: each owner's parameters in order, as many in a round as ``limit`` elements take."""
    rounds: list[set[str]] = []
    place: dict[int, tuple[int, int]] = {}
    for name, owner in owners.items():
        number, used = place.get(owner, (0, 0))
        size = prod(shapes[name])
        if limit is not None and used and used + size > limit:
            number, used = number + 1, 0
        place[owner] = (number, used + size)
        rounds += [set() for _ in range(number + 1 - len(rounds))]
        rounds[number].add(name)
    return [frozenset(names) for names in rounds]
