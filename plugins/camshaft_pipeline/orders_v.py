"""What each rank computes, in which order: schedules whose stages go there and back (V placement, two a rank).

A rank's order is written in words, each repeated so often: ``f0`` is the next forward of the rank's first stage (on the
way there), ``f1`` of its second (on the way back), ``i``, ``w`` and ``b`` likewise, and ``w`` alone the weights' part
of the oldest backward that has only done its inputs.
"""

from __future__ import annotations

from collections import Counter, deque

from camshaft.program import Action, Kind
from camshaft_pipeline.replay import F, I, W

Pattern = tuple[int, str]


def zbv(rank: int, ranks: int, microbatches: int, v: int) -> list[Action]:
    """ZBV (Qi et al., arXiv:2405.15362 and arXiv:2401.10241, section 6): no bubble where F, I and W take the same.

    Each rank works without a gap from its first action to its last; ranks start one after another, and end so. A rank
    holds 2 p activations of half a stage: as many bytes as 1F1B's first.
    """
    behind = ranks - rank
    window = max(microbatches, 2 * ranks - 1)
    patterns = (
        (2 * behind - 1, "f0"),
        (rank, "f1 f0"),
        (behind, "f1 i1 w1"),
        (window - 2 * ranks + rank + 1, "f0 i0 w0 f1 i1 w1"),
        (behind - 1, "i0 w0 f1 i1 w1"),
        (rank, "i0 i1"),
        (behind, "i0 w0"),
        (rank, "w1"),
        (rank, "w0"),
    )
    return _spell(patterns, rank, ranks, microbatches)


def dualpipe_v(rank: int, ranks: int, microbatches: int, v: int) -> list[Action]:
    """DualPipeV (DeepSeek's DualPipe, arXiv:2412.19437, cut in half): F and B of two microbatches in pairs.

    In the steady state an F stands before a B of another microbatch, to be overlapped by whoever can. With B = I + W
    and p ranks the bubble is (p - 1) (FB + B - 3 W) where a pair runs as one that takes FB, and (p - 1) (F + I - W)
    where the two run one after the other; both for W <= I <= F, the first for F = I. A rank holds 2 p + 1 activations
    of half a stage.
    """
    behind = ranks - 1 - rank
    window = max(microbatches, 2 * ranks)
    last = [f"b{1 - index % 2}" if index <= rank else f"i{1 - index % 2}" for index in range(2 * rank + 2)]
    patterns = (
        (2 * behind, "f0"),
        (rank + 1, "f0 f1"),
        (behind, "i1 w f1"),
        (window - 2 * ranks + rank + 1, "f0 b1 f1 b0"),
        (behind, "b1 f1 b0"),
        (1, " ".join(last)),
        (behind, "w i0"),
        (rank + 1, "w"),
    )
    return _spell(patterns, rank, ranks, microbatches)


def _spell(patterns: tuple[Pattern, ...], rank: int, ranks: int, microbatches: int) -> list[Action]:
    """The actions that the patterns stand for; microbatches that the window does not have are left out."""
    stages, done = (rank, 2 * ranks - 1 - rank), Counter[tuple[Kind, int]]()
    waiting: deque[Action] = deque()
    order: list[Action] = []
    for word in (word for times, words in patterns for word in words.split() * times):
        if word == "w":
            action = waiting.popleft()
        else:
            kind, stage = Kind[word[0].upper()], stages[int(word[1])]
            counted = kind if kind is F or kind is W else I  # B and I take from the same microbatches
            action = Action(kind, done[counted, stage], stage)
            done[counted, stage] += 1
            if kind is I:
                waiting.append(Action(W, action.microbatch, stage))
        order.append(action)
    return [action for action in order if action.microbatch < microbatches]
