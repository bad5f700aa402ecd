"""A unit's gradients while they come: the buffer that they are collected in, and what of it is there."""

from __future__ import annotations

from torch import Tensor

from camshaft_zero.pool import Room
from camshaft_zero.storage import Unit


class Filling:
    """A unit's gradients of the backward that runs, or of the window.

    ``buffer`` [layout.size] in the dtype in which backward adds up; None while nothing has been written, and once it
    was summed into ``total``. ``views`` are each member's stretch of it. It lies in a ``room`` where parameters show
    none of it, and else is a tensor of its own, so that whoever keeps a gradient can still read it later.
    """

    def __init__(self, unit: Unit) -> None:
        self.unit = unit
        self.buffer: Tensor | None = None
        self.room: Room | None = None
        self.views: tuple[Tensor, ...] = ()
        self._known: dict[Room, tuple[Tensor, tuple[Tensor, ...]]] = {}
        self.ready = 0
        self.expected = len(unit.layout.members)
        self.complete = False
        self.fresh = [False] * self.expected
        """Whether the buffer holds this microbatch's (this window's) gradient of each member."""
        self.used = [False] * self.expected
        """Whether this rank had a gradient of each member in this window."""
        self.total: Tensor | None = None
        """This rank's stretch of the sum; None until the first sum of the window is there."""

    def move_into(self, room: Room) -> None:
        """Have gradients written to ``room``, which has memory for them."""
        if room not in self._known:
            flat = room.flat[: self.unit.layout.size]
            self._known[room] = flat, self.unit.layout.views(flat)
        self.room, (self.buffer, self.views) = room, self._known[room]

    def have(self, buffer: Tensor) -> None:
        """Have gradients written to ``buffer``, and show them as the parameters'."""
        self.buffer, self.views = buffer, self.unit.layout.views(buffer)

    def move_out(self) -> Room | None:
        """Have no buffer any more; returns the room it was in."""
        room, self.room, self.buffer, self.views = self.room, None, None, ()
        return room

    def drop(self) -> None:
        """Let go of full gradients, whose sum is elsewhere, or which nobody needs any more."""
        for member in self.unit.layout.members:
            member.parameter.grad = None
        self.buffer, self.views = None, ()

    def source(self) -> Tensor:
        """The whole buffer with zeros where there is no gradient."""
        assert self.buffer is not None
        for begin, end in self.unit.layout.gaps:
            self.buffer[begin:end].zero_()
        for view, fresh in zip(self.views, self.fresh, strict=True):
            if not fresh:
                view.zero_()
        return self.buffer
