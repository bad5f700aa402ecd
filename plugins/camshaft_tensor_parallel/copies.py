"""Gradients of parameters that several ranks have copies of, where each rank computed a part of it from its own part of
the activations: norms on tokens of their own, and key/value heads that several ranks' queries use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from math import prod
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from camshaft.comm import Channel
from camshaft.parts import Parts

if TYPE_CHECKING:
    from camshaft.state import World


class Copies:
    """Sums gradients of parameters, by name and local shape, over the ranks of ``channel``.

    They are the ranks with copies, times those with the other pieces of them along data axes: ranks may hold unlike
    pieces (where a table is divided unevenly, flat storage is cut at other places), so each puts its own in the place
    that they have in the parameters themselves.
    """

    def __init__(self, parts: Parts, shapes: Mapping[str, tuple[int, ...]], channel: Channel) -> None:
        self._parts, self._channel = parts, channel
        self._starts: dict[str, int] = {}
        self._total = 0
        for name, shape in shapes.items():
            self._starts[name] = self._total
            self._total += prod(shape)

    def sum(self) -> None:
        """Sum ``part.tensor.grad``; a parameter that no rank used keeps none."""
        own = self._own()
        dtype = next((part.tensor.dtype for part in self._parts), torch.float32)
        device = next((part.tensor.device for part in self._parts), torch.device("cpu"))
        flat = torch.zeros(self._total, dtype=dtype, device=device)
        places = [flat[start : start + gradient.numel()] for start, gradient in own]
        gradients = [gradient for _, gradient in own]
        if own:
            torch._foreach_copy_(places, gradients)
        self._channel.all_reduce(flat, "reduce_parts").wait()
        if own:
            torch._foreach_copy_(gradients, places)

    def _own(self) -> Sequence[tuple[int, Tensor]]:
        """This rank's stretches of gradients, and where they start in the buffer."""
        return [
            (self._starts[piece.name] + piece.start, stretch)
            for part in self._parts
            if part.tensor.grad is not None
            for piece, stretch in part.slices(part.tensor.grad)
            if piece.name in self._starts
        ]


def sharers(world: World, count: int, plugin: str) -> Channel:
    """The channel to ranks with the same copies, ``count`` of them along ``tp``, and to those with other pieces of them
    along data axes. All ranks call this.
    """
    shape, own = world.mesh.shape, world.mesh.place
    data = () if world.parts.channel is None else tuple(world.parts.channel.axis.split("+"))
    axis = shape.joined(*data, "tp")
    if count == world.mesh.degree("tp"):
        channel = world.mesh.channel(plugin, axis)
        assert channel is not None
        return channel
    free = set(axis.split("+"))

    def together(place: Mapping[str, int]) -> bool:
        same = all(place[each.name] == own[each.name] for each in shape.axes if each.name not in free)
        return same and place["tp"] // count == own["tp"] // count

    ranks = [rank for rank in range(shape.world_size) if together(shape.coordinates(rank))]
    timeout = timedelta(seconds=world.recipe.launch.group_timeout_s)
    group = dist.new_group(ranks, timeout=timeout, use_local_synchronization=True)
    return Channel(group, plugin, axis, timeout)
