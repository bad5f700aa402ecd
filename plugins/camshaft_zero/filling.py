"""A unit's gradients while they come: the buffer that they are collected in, and what of it is there."""

from __future__ import annotations

from torch import Tensor

from camshaft_zero.pool import Pool
from camshaft_zero.storage import Unit


class Filling:
    """A unit's gradients of the backward that runs, or of the window.

    ``buffer`` [layout.size] in the dtype in which backward adds up; None while nothing has been written (then it is
    taken from the pool).
    """

    def __init__(self, unit: Unit, buffer: Tensor | None) -> None:
        self.unit, self.buffer = unit, buffer
        self.views: tuple[Tensor, ...] = () if buffer is None else self.views_of(buffer)
        self._known: dict[int, tuple[Tensor, ...]] = {}
        self.ready = 0
        self.expected = len(unit.layout.members)
        self.complete = False
        self.fresh = [False] * self.expected
        """Whether the buffer holds this microbatch's (this window's) gradient of each member."""
        self.used = [False] * self.expected
        """Whether this rank had a gradient of each member in this window."""
        self.total: Tensor | None = None
        """This rank's stretch of the sum; None until the first sum of the window is there."""

    def views_of(self, buffer: Tensor) -> tuple[Tensor, ...]:
        return tuple(member.view(buffer) for member in self.unit.layout.members)

    def take(self, pool: Pool) -> None:
        """Get a buffer that this microbatch's gradients can be written to."""
        self.buffer = buffer = pool.take()
        flat = buffer[: self.unit.layout.size]
        if buffer.data_ptr() not in self._known:
            self._known[buffer.data_ptr()] = self.views_of(flat)
        self.views = self._known[buffer.data_ptr()]

    def forget(self) -> None:
        """Drop the views of buffers that are gone."""
        self._known.clear()
        if self.buffer is None:
            self.views = ()

    def source(self) -> Tensor:
        """The whole buffer with zeros where there is no gradient."""
        assert self.buffer is not None
        flat = self.buffer[: self.unit.layout.size]
        for begin, end in self.unit.layout.gaps:
            flat[begin:end].zero_()
        for view, fresh in zip(self.views, self.fresh, strict=True):
            if not fresh:
                view.zero_()
        return flat
