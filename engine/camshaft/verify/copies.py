"""Whether each element lies on as many ranks as its piece says: norms and trust ratios count it once by that."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import chain

import torch

from camshaft.errors import CamshaftError
from camshaft.parts import Piece
from camshaft.state import World
from camshaft.testing.record import places

Held = list[tuple[int, Piece]]
"""Pieces, each with the rank that holds it."""


class WrongCopies(CamshaftError):
    """A piece says another number of copies than there are; raised on all ranks alike."""


def check(world: World) -> None:
    """Compare what pieces say with where they are. Collective.

    Raises:
        WrongCopies: names the parameter, and what is said of it.
    """
    held = [part for part in chain(world.parts, world.stored) if not hasattr(part.tensor, "to_local")]
    own = [piece for part in held for piece in part.pieces]
    everyone: list[list[Piece]] = [own]
    if world.world_size > 1:
        everyone = [[] for _ in range(world.world_size)]
        torch.distributed.all_gather_object(everyone, own)
    for pieces in _models(world, everyone):
        for fault in faults(pieces):
            raise WrongCopies(fault)


def _models(world: World, everyone: list[list[Piece]]) -> Iterable[Held]:
    """The pieces of each copy of the whole model: of ranks that have one place along all axes that divide none."""
    shape, channel = world.mesh.shape, world.parts.everyone
    axes = [] if channel is None else [member for name in channel.axis.split("+") for member in shape.members(name)]
    found: dict[tuple[int, ...], Held] = defaultdict(list)
    for rank, pieces in enumerate(everyone):
        at = shape.coordinates(rank)
        found[tuple(at[axis.name] for axis in shape.axes if axis.name not in axes)] += [(rank, each) for each in pieces]
    return found.values()


def faults(held: Held) -> Iterator[str]:
    """One line for each parameter of one copy of the model that lies on other ranks than its pieces say."""
    by_name: dict[str, Held] = defaultdict(list)
    for rank, piece in held:
        by_name[piece.name].append((rank, piece))
    for name, own in by_name.items():
        count = torch.zeros(own[0][1].whole_shape, dtype=torch.int64).view(-1)
        for _, piece in own:
            count[places(piece)] += 1
        for rank, piece in own:
            there = count[places(piece)]
            if bool((there != piece.copies).any()):
                ranks = int(there[there != piece.copies][0])
                yield f"elements of '{name}' lie on {ranks} ranks, and rank {rank} is told of {piece.copies}"
                break
