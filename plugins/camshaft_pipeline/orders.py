"""What each rank computes, in which order: schedules whose stages go round and round the ranks (loop placement).

Each function gives one rank's order; all are pure. ``v`` is the number of virtual stages a rank holds.
"""

from __future__ import annotations

from collections.abc import Iterator

from camshaft.program import Action
from camshaft_pipeline.replay import B, F, I, W


def breadth_first(rank: int, ranks: int, microbatches: int, v: int) -> list[Action]:
    """All forwards, then all backwards (GPipe, Huang et al., arXiv:1811.06965).

    With v > 1 all microbatches go through one stage before the next one (breadth-first, Lamy-Poirier,
    arXiv:2211.05953). Bubble (p - 1) / (v m) of the ideal time; a rank holds v m activations.
    """
    order = [Action(F, microbatch, rank + k * ranks) for k in range(v) for microbatch in range(microbatches)]
    order += [Action(B, microbatch, rank + k * ranks) for k in reversed(range(v)) for microbatch in range(microbatches)]
    return order


def one_forward_one_backward(rank: int, ranks: int, microbatches: int, v: int) -> list[Action]:
    """1F1B with a flush (PipeDream-flush; Narayanan et al., arXiv:2104.04473, section 2.2.1).

    Rank r runs p - 1 - r forwards ahead, then one forward and one backward in turn. Bubble (p - 1) / m of the ideal
    time; rank r holds p - r activations.
    """
    ahead = min(ranks - 1 - rank, microbatches)
    forward = [Action(F, microbatch, rank) for microbatch in range(microbatches)]
    return _alternate(forward, [Action(B, microbatch, rank) for microbatch in range(microbatches)], ahead)


def interleaved(rank: int, ranks: int, microbatches: int, v: int) -> list[Action]:
    """Interleaved 1F1B (Narayanan et al., arXiv:2104.04473, section 2.2.2).

    p microbatches go through a stage, then the same ones through the rank's next stage, and so on. Where p does not
    divide m, the rounds are larger: as even as can be, none smaller than p, so that the bubble stays (p - 1) / (v m)
    of the ideal time for every m >= p. Rank r holds 2 (p - r) - 1 + (v - 1) g activations, g the largest round.
    """
    sizes = rounds(ranks, microbatches)
    ahead = min(2 * (ranks - 1 - rank) + (v - 1) * sizes[0], v * microbatches)
    forward = [Action(F, microbatch, rank + k * ranks) for microbatch, k in _round_by_round(sizes, v)]
    backward = [Action(B, microbatch, rank + (v - 1 - k) * ranks) for microbatch, k in _round_by_round(sizes, v)]
    return _alternate(forward, backward, ahead)


def rounds(ranks: int, microbatches: int) -> list[int]:
    """Microbatches in each round of the interleaved schedule, the larger rounds first."""
    count = max(1, microbatches // ranks)
    size, more = divmod(microbatches, count)
    return [size + 1] * more + [size] * (count - more)


def zb_h1(rank: int, ranks: int, microbatches: int, v: int) -> list[Action]:
    """ZB-H1 (Qi et al., arXiv:2401.10241, section 2.1): 1F1B whose weights' backward fills the gaps at the end.

    Rank r runs W r microbatches behind I, so that each rank holds as many activations as 1F1B's first, p. Bubble
    (p - 1) (F + I - W), a third of 1F1B's where all three take the same time.
    """
    forward = [Action(F, microbatch, rank) for microbatch in range(microbatches)]
    inputs = [Action(I, microbatch, rank) for microbatch in range(microbatches)]
    order: list[Action] = []
    for action in _alternate(forward, inputs, min(ranks - 1 - rank, microbatches)):
        order.append(action)
        if action.kind is I and action.microbatch >= rank:
            order.append(Action(W, action.microbatch - rank, rank))
    return order + [Action(W, microbatch, rank) for microbatch in range(max(microbatches - rank, 0), microbatches)]


def _round_by_round(sizes: list[int], v: int) -> Iterator[tuple[int, int]]:
    """(microbatch, which of the rank's stages): a round of microbatches through each stage, then the next round."""
    first = 0
    for size in sizes:
        yield from ((first + index, k) for k in range(v) for index in range(size))
        first += size


def _alternate(forward: list[Action], backward: list[Action], ahead: int) -> list[Action]:
    """``ahead`` forwards, then one of each in turn while there are forwards, then the rest of the backwards."""
    order = forward[:ahead]
    for pair in zip(forward[ahead:], backward, strict=False):
        order += pair
    return order + backward[len(forward) - ahead :]
