"""Which results to keep within a budget of memory: a knapsack, where each has bytes and seconds. No torch.

Results are taken by seconds saved a byte, densest first, and those that do not fit are passed over (Dantzig, Operations
Research 5, 1957): what is left on the table is less than the seconds of the one densest result that did not fit. And a
module can be left as it is, which keeps less than all results of all of its operations, since backward needs few of
them: each number of such modules is tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Cost(NamedTuple):
    """Of one operation's result."""

    bytes: int
    seconds: float


Choice = frozenset[int] | None
"""Numbers of the results that a module keeps; None: it is left as it is, and never runs again."""


def best(modules: Sequence[Sequence[Cost]], wholes: Sequence[Cost], budget: int) -> list[Choice]:
    """What each module keeps, ``budget`` bytes in all at most, so that most seconds are saved.

    Args:
        modules: of each module the results that it could keep.
        wholes: of each module what it keeps when it is left as it is, and the seconds of running it again.
        budget: bytes.

    The same costs give the same choice everywhere: equal densities are taken in the order of modules and operations.
    """
    items = sorted(
        (-cost.seconds / max(cost.bytes, 1), place, number)
        for place, costs in enumerate(modules)
        for number, cost in enumerate(costs)
        if cost.seconds > 0
    )
    order = sorted(range(len(modules)), key=lambda place: -wholes[place].seconds / max(wholes[place].bytes, 1))
    chosen, most = _with(modules, items, frozenset(), budget)
    left, seconds = set[int](), 0.0
    for place in order:
        budget -= wholes[place].bytes
        if budget < 0:
            break
        left.add(place)
        seconds += wholes[place].seconds
        results, saved = _with(modules, items, frozenset(left), budget)
        if seconds + saved > most:
            chosen, most = results, seconds + saved
    return chosen


def _with(
    modules: Sequence[Sequence[Cost]], items: Sequence[tuple[float, int, int]], left: frozenset[int], budget: int
) -> tuple[list[Choice], float]:
    """Results to keep where modules ``left`` are as they are, and the seconds that those results save."""
    kept: list[set[int]] = [set() for _ in modules]
    seconds = 0.0
    for _, place, number in items:
        cost = modules[place][number]
        if place not in left and cost.bytes <= budget:
            budget -= cost.bytes
            seconds += cost.seconds
            kept[place].add(number)
    return [None if place in left else frozenset(each) for place, each in enumerate(kept)], seconds
