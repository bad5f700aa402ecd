"""Which results to keep within a budget of memory: a knapsack, where each has bytes and seconds. No torch.

Results are taken by seconds saved a byte, densest first, and those that do not fit are passed over (Dantzig, Operations
Research 5, 1957). What is left on the table is less than the seconds of the one densest result that did not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Cost(NamedTuple):
    """Of one operation's result."""

    bytes: int
    seconds: float


def best(modules: Sequence[Sequence[Cost]], budget: int) -> list[frozenset[int]]:
    """Of each module's call the numbers of the results to keep, ``budget`` bytes in all at most.

    The same costs give the same choice everywhere: equal densities are taken in the order of modules and operations.
    """
    items = [
        (-cost.seconds / max(cost.bytes, 1), place, number)
        for place, costs in enumerate(modules)
        for number, cost in enumerate(costs)
        if cost.seconds > 0
    ]
    kept: list[set[int]] = [set() for _ in modules]
    for _, place, number in sorted(items):
        size = modules[place][number].bytes
        if size <= budget:
            budget -= size
            kept[place].add(number)
    return [frozenset(each) for each in kept]
