"""How fast a run goes and how long it still takes, measured at the log records."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from time import monotonic

_WINDOW = 20
"""Records that the rate is measured over: long enough to smooth, short enough to follow a change."""


class Progress:
    """Rates of steps and tokens over the last records, evaluation and checkpoints included.

    ``max_steps`` and ``max_tokens`` are the limits of the run; ``None`` where there is none.
    """

    def __init__(self, max_steps: int | None, max_tokens: int | None, clock: Callable[[], float] = monotonic) -> None:
        self._limits = (max_steps, max_tokens)
        self._clock = clock
        self._seen: deque[tuple[float, tuple[float, float]]] = deque(maxlen=_WINDOW)

    def add(self, step: int, tokens: int) -> None:
        """Note that ``step`` steps and ``tokens`` tokens are done now. The first call is the start of the run."""
        self._seen.append((self._clock(), (step, tokens)))

    def add_record(self, record: Mapping[str, float | int]) -> None:
        self.add(int(record["progress/global_step"]), int(record.get("progress/consumed_tokens", 0)))

    def eta_s(self) -> float | None:
        """Seconds to the nearest limit, or None while that cannot be known."""
        if len(self._seen) < 2:
            return None
        (start, first), (now, last) = self._seen[0], self._seen[-1]
        left = [
            (limit - after) * (now - start) / (after - before)
            for limit, before, after in zip(self._limits, first, last, strict=True)
            if limit is not None and after > before
        ]
        return min(left, default=None)
