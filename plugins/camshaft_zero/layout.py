"""Where parameters lie in a flat buffer, and which pieces of them a stretch of it holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from camshaft.parts import Piece
from camshaft_zero.grouping import ALIGNMENT, aligned

ROLES = ("matrix", "embedding", "norm", "bias")


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """One parameter of a flat buffer, at elements ``place`` to ``place + size``."""

    name: str
    parameter: Parameter
    role: str
    shape: tuple[int, ...]
    place: int
    size: int

    def view(self, flat: Tensor) -> Tensor:
        """Its stretch of ``flat`` in its own shape."""
        return flat[self.place : self.place + self.size].view(self.shape)


class Layout:
    """Parameters one after another, those of one role together, padded to ``divisor`` equal stretches."""

    def __init__(self, named: Sequence[tuple[str, Parameter, str]], divisor: int) -> None:
        members, place = [], 0
        for name, parameter, role in sorted(named, key=lambda each: _rank(each[2])):
            shape = tuple(parameter.shape)
            members.append(Member(name, parameter, role, shape, place, parameter.numel()))
            place += aligned(parameter.numel())
        self.members = tuple(members)
        self.size = aligned(max(place, 1), divisor * ALIGNMENT)
        """Elements of the buffer."""
        ends = [member.place + member.size for member in members]
        starts = [member.place for member in members[1:]] + [self.size]
        self.gaps = tuple((end, start) for end, start in zip(ends, starts, strict=True) if start > end)
        """Stretches that belong to no parameter."""
        self._cuts: list[int] = []
        self._at: list[int] = []
        for member, start in zip(members, starts, strict=True):
            self._at.append(len(self._cuts))
            self._cuts += [length for length in (member.size, start - member.place - member.size) if length]

    def views(self, flat: Tensor) -> tuple[Tensor, ...]:
        """Each member's stretch of ``flat`` [size] in its shape; all in one call, which is a third of the time."""
        with torch.no_grad():  # else nobody may write to one of several views
            stretches = flat.split_with_sizes(self._cuts)
            return tuple(
                stretches[at] if len(member.shape) == 1 else stretches[at].view(member.shape)
                for at, member in zip(self._at, self.members, strict=True)
            )

    def pieces(self, begin: int, end: int) -> Iterator[tuple[str, int, int, tuple[Piece, ...]]]:
        """(role, first, last, pieces) of each role's share of elements ``begin`` to ``end``; places count from
        first.
        """
        inside = [member for member in self.members if member.place < end and member.place + member.size > begin]
        for role in dict.fromkeys(member.role for member in inside):
            group = [member for member in inside if member.role == role]
            first = max(begin, group[0].place)
            last = min(end, group[-1].place + group[-1].size)
            yield role, first, last, tuple(_piece(member, first, last) for member in group)


def _rank(role: str) -> int:
    return ROLES.index(role) if role in ROLES else len(ROLES)


def _piece(member: Member, first: int, last: int) -> Piece:
    begin, end = max(first, member.place), min(last, member.place + member.size)
    return Piece(member.name, member.shape, begin - member.place, begin - first, end - begin)
