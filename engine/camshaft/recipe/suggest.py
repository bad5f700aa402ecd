"""The name that a user probably meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches

_LONGEST = 80


def nearest(word: str, names: Iterable[str]) -> str | None:
    """The name closest to ``word``, or None when none is close.

    Few single-character edits come first, then the share of equal characters, so that both ``lrr`` and
    ``batch_size`` (for ``micro_batch_size``) find theirs.
    """
    word = _fold(word)[:_LONGEST]
    folded = {_fold(name): name for name in names}
    edits = {name: distance(word, name) for name in folded if abs(len(word) - len(name)) <= _limit(name)}
    close = [name for name, count in edits.items() if count <= _limit(name)]
    if close:
        return folded[min(close, key=lambda name: (edits[name], -SequenceMatcher(None, word, name).ratio()))]
    similar = get_close_matches(word, folded, n=1, cutoff=0.65)
    return folded[similar[0]] if similar else None


def _limit(name: str) -> int:
    """Edits after which a word is no misspelling of ``name`` any more."""
    return max(1, len(name) // 4)


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
