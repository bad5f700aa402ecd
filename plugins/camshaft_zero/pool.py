"""A few buffers that units use in turn."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class Pool:
    """Buffers of ``size`` elements, ``limit`` of them as long as waiting for their users frees one."""

    limit = 2

    def __init__(self, size: int, make: Callable[[int], Tensor], wait: Callable[[], bool]) -> None:
        self._size, self._make, self._wait = size, make, wait
        self._free: list[Tensor] = []
        self.made = 0

    def take(self) -> Tensor:
        """A buffer that nobody uses; one more is made only when no user can be waited for."""
        while not self._free and self.made >= self.limit and self._wait():
            pass
        if self._free:
            return self._free.pop()
        self.made += 1
        return self._make(self._size)

    def give(self, buffer: Tensor) -> None:
        """Take a buffer back."""
        self._free.append(buffer)

    def clear(self) -> None:
        """Let go of the buffers that nobody uses."""
        self.made -= len(self._free)
        self._free.clear()
