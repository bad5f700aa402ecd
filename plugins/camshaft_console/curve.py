"""A loss curve made of characters, for a terminal: braille where the encoding has it, plain ASCII elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

Points = Sequence[tuple[float, float]]
"""(step, value) pairs, ascending in step."""

_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""Bit of each dot of a braille character (Unicode block U+2800), by column and row."""


def draw(train: Points, evaluation: Points = (), *, width: int = 60, height: int = 10, ascii_only: bool) -> list[str]:
    """Lines of a chart with both axes labelled, or no lines when fewer than two finite points are given.

    ``width`` and ``height`` are those of the plotting area in characters. Points that fall into one column of dots
    are averaged; evaluation points are single marks.
    """
    train, evaluation = _finite(train), _finite(evaluation)
    everything = [*train, *evaluation]
    if len(everything) < 2:
        return []
    steps, values = zip(*everything, strict=True)
    left, right, low, high = min(steps), max(steps), min(values), max(values)
    across, down = (1, 1) if ascii_only else (2, 4)
    columns = _columns(train, left, right, width * across)
    heights = {column: _scale(high - value, high - low, height * down) for column, value in columns.items()}
    cells = _ascii(heights, width, height) if ascii_only else _braille(heights, width, height)
    for step, value in evaluation:
        row, column = _scale(high - value, high - low, height), _scale(step - left, right - left, width)
        cells[row][column] = "o" if ascii_only else "●"
    lines = _with_axes(cells, (left, right), (low, high), ascii_only)
    return [*lines, _legend(bool(train), bool(evaluation), ascii_only)]


def _finite(points: Points) -> list[tuple[float, float]]:
    return [(step, value) for step, value in points if math.isfinite(value)]


def _scale(offset: float, span: float, cells: int) -> int:
    return min(cells - 1, int(offset / span * cells)) if span > 0 else 0


def _columns(points: Points, left: float, right: float, count: int) -> dict[int, float]:
    """Mean value of each column of dots, with straight lines over the columns between two points."""
    found: dict[int, list[float]] = {}
    for step, value in points:
        found.setdefault(_scale(step - left, right - left, count), []).append(value)
    means = {column: sum(values) / len(values) for column, values in sorted(found.items())}
    filled = dict(means)
    for start, stop in zip(list(means), list(means)[1:], strict=False):
        for column in range(start + 1, stop):
            part = (column - start) / (stop - start)
            filled[column] = means[start] * (1 - part) + means[stop] * part
    return dict(sorted(filled.items()))


def _strokes(heights: dict[int, int]) -> Iterable[tuple[int, int]]:
    """(column, row) of every dot: each column reaches up or down to its left neighbour, so that steps stay joined."""
    before: int | None = None
    for column, row in heights.items():
        first = row if before is None or before == row else before + (1 if row > before else -1)
        yield from ((column, dot) for dot in range(min(first, row), max(first, row) + 1))
        before = row


def _braille(heights: dict[int, int], width: int, height: int) -> list[list[str]]:
    bits = [[0] * width for _ in range(height)]
    for column, row in _strokes(heights):
        bits[row // 4][column // 2] |= _DOTS[column % 2][row % 4]
    return [[chr(0x2800 + cell) if cell else " " for cell in line] for line in bits]


def _ascii(heights: dict[int, int], width: int, height: int) -> list[list[str]]:
    cells = [[" "] * width for _ in range(height)]
    for column, row in _strokes(heights):
        cells[row][column] = "*"
    return cells


def _with_axes(
    cells: list[list[str]], steps: tuple[float, float], values: tuple[float, float], ascii_only: bool
) -> list[str]:
    tick, bar, corner, dash = ("|", "|", "+", "-") if ascii_only else ("┤", "│", "└", "─")
    low, high = values
    labels = {0: f"{high:.4g}", len(cells) - 1: f"{low:.4g}", len(cells) // 2: f"{(low + high) / 2:.4g}"}
    margin = max(len(label) for label in labels.values())
    lines = [
        f"{labels.get(row, ''):>{margin}} {tick if row in labels else bar}{''.join(line)}".rstrip()
        for row, line in enumerate(cells)
    ]
    left, right = f"{steps[0]:.0f}", f"{steps[1]:.0f}"
    width = len(cells[0])
    return [
        *lines,
        f"{'':>{margin}} {corner}{dash * width}",
        f"{'':>{margin}}  {left}{right:>{max(width - len(left), len(right) + 1)}}",
    ]


def _legend(train: bool, evaluation: bool, ascii_only: bool) -> str:
    parts = ["loss over steps:"]
    parts += [f"{'*' if ascii_only else '⠒'} train"] if train else []
    parts += [f"{'o' if ascii_only else '●'} eval"] if evaluation else []
    return " ".join(parts)
