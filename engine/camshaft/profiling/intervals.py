"""Sets of points in time as sorted, disjoint intervals."""

from __future__ import annotations

from collections.abc import Iterable

Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The points that are in any of ``intervals``; those that touch are joined, empty ones dropped."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if end <= start:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def subtract(left: list[Interval], right: list[Interval]) -> list[Interval]:
    """The points of ``left`` that are not in ``right``; both are unions."""
    found: list[Interval] = []
    index = 0
    for start, end in left:
        while index < len(right) and right[index][1] <= start:
            index += 1
        place = index
        while place < len(right) and right[place][0] < end:
            if right[place][0] > start:
                found.append((start, right[place][0]))
            start = right[place][1]
            place += 1
        if start < end:
            found.append((start, end))
    return found


def clip(intervals: Iterable[Interval], bounds: list[Interval]) -> list[Interval]:
    """The points of ``intervals`` inside of ``bounds``, a union."""
    inside = union(intervals)
    return subtract(inside, subtract(inside, bounds))


def length(intervals: Iterable[Interval]) -> float:
    """Total of disjoint intervals."""
    return sum(end - start for start, end in intervals)
