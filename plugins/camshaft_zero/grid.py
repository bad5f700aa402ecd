"""The ranks that divide a buffer, and those that hold copies of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from camshaft.comm import Channel

if TYPE_CHECKING:
    from camshaft.state import World
    from camshaft_zero.placement import Placement


class Grid:
    """This rank's place. ``inner`` divides a buffer into ``ranks`` stretches; along ``outer`` ranks hold copies.

    With ``divided`` the optimizer's values of a stretch are divided once more, along ``outer``. Channels are None for
    a degree of 1.
    """

    def __init__(self, world: World, placement: Placement, plugin: str) -> None:
        def line(axis: str | None) -> Channel | None:
            return None if axis is None or world.mesh.degree(axis) == 1 else world.mesh.channel(plugin, axis)

        self.inner, self.outer = line(placement.shard), line(placement.replicate)
        self.ranks = 1 if self.inner is None else self.inner.size
        self.rank = 0 if self.inner is None else self.inner.rank
        self.divided = placement.optimizer_outer and self.outer is not None
        self.copies = 1 if self.outer is None else self.outer.size
        self.slices = self.copies if self.divided else 1
        """Into how many parts a stretch is divided for the optimizer."""
        for dividing in (self.inner, self.outer if self.divided else None):
            if dividing is not None:
                dividing.split_directions()
        self.slice = self.outer.rank if self.divided and self.outer is not None else 0
        self.everyone = line("dp")
        """All data ranks."""
        both = self.divided and self.inner is not None
        self.parts = self.everyone if both else self.outer if self.divided else self.inner
        """Ranks that hold the other pieces of what this one updates."""

    @property
    def alone(self) -> bool:
        """Whether no other rank is involved."""
        return self.inner is None and self.outer is None

    @property
    def divisor(self) -> int:
        """Equal stretches that a buffer must have."""
        return self.ranks * self.slices

    def stretch(self, size: int) -> tuple[int, int]:
        """(begin, end) of this rank's stretch of a buffer of ``size`` elements."""
        chunk = size // self.ranks
        return self.rank * chunk, (self.rank + 1) * chunk

    def updated(self, size: int) -> tuple[int, int]:
        """(begin, end), in the whole buffer, of what this rank's optimizer updates."""
        begin, end = self.stretch(size)
        chunk = (end - begin) // self.slices
        return begin + self.slice * chunk, begin + (self.slice + 1) * chunk
