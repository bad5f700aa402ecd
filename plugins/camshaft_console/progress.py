"""How fast a run goes and how long it still takes, measured at the log records."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from time import monotonic

_WINDOW = 20
"""Records that the rate is measured over: long enough to smooth, short enough to follow a change."""


class Progress:
    """The rate of steps over the last records, evaluation and checkpoints included."""

    def __init__(self, total_steps: int, clock: Callable[[], float] = monotonic) -> None:
        self._total_steps = total_steps
        self._clock = clock
        self._seen: deque[tuple[float, int]] = deque(maxlen=_WINDOW)

    def add(self, step: int) -> None:
        """Note that ``step`` steps are done now. The first call is the start of the run."""
        self._seen.append((self._clock(), step))

    def eta_s(self) -> float | None:
        """Seconds to the last step, or None while that cannot be known."""
        if len(self._seen) < 2:
            return None
        (start, before), (now, after) = self._seen[0], self._seen[-1]
        return (self._total_steps - after) * (now - start) / (after - before) if after > before else None
