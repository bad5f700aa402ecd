"""A unit's gradients while they come: the buffer that they are collected in, and what of it is there."""

from __future__ import annotations

from torch import Tensor

from camshaft_zero.pool import Room
from camshaft_zero.storage import Unit


class Filling:
    """A unit's gradients of the backward that runs, or of the window.

    ``buffer`` [layout.size] in the dtype in which backward adds up; None while nothing has been written, and once it
    was summed into ``total``. ``views`` are each member's stretch of it.
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

    def fill(self, room: Room) -> None:
        """Have gradients written to ``room``, which has memory for them."""
        if room not in self._known:
            flat = room.flat[: self.unit.layout.size]
            self._known[room] = flat, tuple(member.view(flat) for member in self.unit.layout.members)
        self.room, (self.buffer, self.views) = room, self._known[room]

    def leave(self) -> Room | None:
        """Have no buffer any more; returns the room it was in."""
        room, self.room, self.buffer = self.room, None, None
        return room

    def empty(self) -> None:
        """Let go of full gradients, whose sum is elsewhere, or which nobody needs any more."""
        for member in self.unit.layout.members:  # they are views of it
            member.parameter.grad = None
        room = self.leave()
        if room is not None:
            room.hold(0)

    def source(self) -> Tensor:
        """The whole buffer with zeros where there is no gradient."""
        assert self.buffer is not None
        for begin, end in self.unit.layout.gaps:
            self.buffer[begin:end].zero_()
        for view, fresh in zip(self.views, self.fresh, strict=True):
            if not fresh:
                view.zero_()
        return self.buffer
