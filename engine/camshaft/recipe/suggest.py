"""The name that a user probably meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher


def nearest(word: str, names: Iterable[str]) -> str | None:
    """The name closest to ``word``, or None when none is close.

    Few single-character edits come first, then the share of equal characters, so that both ``lrr`` and
    ``batch_size`` (for ``micro_batch_size``) find theirs.
    """
    word = _fold(word)[:80]
    best, score = None, 0.0
    for name in names:
        edits = distance(word, _fold(name))
        ratio = SequenceMatcher(None, word, _fold(name)).ratio()
        if edits > max(1, len(name) // 4) and ratio < 0.65:
            continue
        rank = ratio - edits
        if best is None or rank > score:
            best, score = name, rank
    return best


def distance(left: str, right: str) -> int:
    """Edits (insert, delete, replace, swap of neighbours) from one word to the other: optimal string alignment."""
    before: list[int] = []
    last = list(range(len(right) + 1))
    for row, sign in enumerate(left, 1):
        line = [row]
        for column, other in enumerate(right, 1):
            cost = min(last[column] + 1, line[-1] + 1, last[column - 1] + (sign != other))
            if row > 1 and column > 1 and sign == right[column - 2] and left[row - 2] == other:
                cost = min(cost, before[column - 2] + 1)
            line.append(cost)
        before, last = last, line
    return last[-1]


def _fold(name: str) -> str:
    return name.lower().replace("-", "_").replace(" ", "_")
