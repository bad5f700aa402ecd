"""Memory for full gradients: it comes when they do and goes when they were summed, under views that stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from camshaft_zero.costs import TURNS


class Room:
    """A tensor whose memory comes and goes; views of it are made once. Without memory nobody may read or write them.

    ``flat`` has the elements of the largest use, and memory for those of the present one.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.flat = torch.empty(size, dtype=dtype, device=device)
        self._storage, self._itemsize = self.flat.untyped_storage(), dtype.itemsize
        self.elements = size
        """That there is memory for."""
        self.hold(0)

    def hold(self, elements: int) -> None:
        """Have memory for so many elements, of any content; 0: for none."""
        if elements != self.elements:
            self._storage.resize_(0)  # else what was in it would be copied
            self._storage.resize_(elements * self._itemsize)
            self.elements = elements


class Pool:
    """Rooms that units use in turn: as many as ``budget`` elements allow, or as cannot be waited for.

    ``make`` gives one more room; ``wait`` waits for a user, who gives his back, and is False when there is none.
    """

    def __init__(self, budget: int, make: Callable[[], Room], wait: Callable[[], bool]) -> None:
        self._budget, self._make, self._wait = budget, make, wait
        self._rooms: list[Room] = []
        self._free: list[Room] = []

    def take(self, size: int) -> Room:
        """A room that nobody uses, with memory for ``size`` elements."""
        while not any(room.elements == size for room in self._free) and self._held() + size > self._budget:
            if any(room.elements for room in self._free):
                self.clear()
            elif not self._wait():
                break
        chosen = min(self._free, key=lambda room: (room.elements != size, room.elements), default=None)
        if chosen is None:
            chosen = self._make()
            self._rooms.append(chosen)
        else:
            self._free.remove(chosen)
        chosen.hold(size)
        return chosen

    def give(self, room: Room) -> None:
        """Take a room back, with its memory: the next unit may need as much."""
        self._free.append(room)

    def clear(self) -> None:
        """Let go of the memory that nobody uses."""
        for room in self._free:
            room.hold(0)

    def _held(self) -> int:
        return sum(room.elements for room in self._rooms)


def budget_of(sizes: Sequence[int]) -> int:
    """Elements of the largest of ``sizes``, as many as the plan counts: one is filled while another's sum travels."""
    return sum(sorted(sizes)[-TURNS:])
