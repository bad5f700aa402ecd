"""Eager 1F1B (Zhuang et al., arXiv:2211.05322, section 4): 1F1B that runs as many forwards ahead again.

Rank r of p runs 2 (p - 1 - r) forwards before its first backward, so that every activation is on its way for the time
of a whole forward before it is needed: transfers are hidden. Memory: min(2 (p - r) - 1, m) activations on rank r, where
1F1B holds p - r. Bubble: (p - 1) / m of the ideal time, as 1F1B's.
"""

from __future__ import annotations

from camshaft.program import Action, Kind
from camshaft.schedules import Offer


def order(rank: int, ranks: int, microbatches: int, v: int) -> list[Action]:
    """Forwards ahead, then one forward and one backward in turn, then the rest of the backwards."""
    ahead = min(2 * (ranks - 1 - rank), microbatches)
    found = [Action(Kind.F, microbatch, rank) for microbatch in range(ahead)]
    for microbatch in range(microbatches):
        if ahead + microbatch < microbatches:
            found.append(Action(Kind.F, ahead + microbatch, rank))
        found.append(Action(Kind.B, microbatch, rank))
    return found


def peak(rank: int, ranks: int, microbatches: int, v: int) -> int:
    """The most activations that ``rank`` holds."""
    return min(2 * (ranks - rank) - 1, microbatches)


OFFER = Offer(order, peak)
