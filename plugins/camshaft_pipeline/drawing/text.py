"""A schedule as plain text: a line for each rank, time from left to right."""

from __future__ import annotations

import math
from collections.abc import Callable

from camshaft.program import Action
from camshaft_pipeline.drawing import Measured, Row, headline, kinds, length, rows
from camshaft_pipeline.simulator import Timeline

Naming = Callable[[Action], str]
Placed = tuple[Action, int, int]


def draw(timeline: Timeline, width: int = 100, measured: Measured | None = None) -> str:
    """The headline, a row of at most ``width`` characters for each rank, and what the letters mean.

    A column shows what runs in its middle, ``.`` where the rank waits. Actions are named with microbatch and stage if
    nearly all have room for that, else with the microbatch, else by their letter alone.
    """
    drawn = rows(timeline, measured)
    labels = [_label(row) for row in drawn]
    margin = max(map(len, labels)) + 1
    columns = max(width - margin, 10)
    end = length(drawn)
    placed = [_columns(row, end, columns) for row in drawn]
    naming = next(naming for naming in _NAMINGS if naming is _letter or _fits(naming, placed))
    lines = [f"{label:<{margin}}{_line(found, naming, columns)}" for label, found in zip(labels, placed, strict=True)]
    legend = [f"{kind.name} {kind.value}" for kind in kinds(drawn)]
    scale = f"a column is {end / columns:.3g}"
    return "\n".join([headline(timeline, drawn), *lines, "  ".join([*legend, ". waits", scale])])


def _label(row: Row) -> str:
    return "  measured" if row.measured else f"rank {row.rank}"


def _letter(action: Action) -> str:
    return action.kind.name


def _numbered(action: Action) -> str:
    return f"{action.kind.name}{action.microbatch}"


_NAMINGS: tuple[Naming, ...] = (str, _numbered, _letter)


def _columns(row: Row, end: float, columns: int) -> list[Placed]:
    """Each action and its columns: those whose middle lies in [start, end), so that neighbours never share one."""
    scale = columns / (end or 1)
    return [(span.action, math.ceil(span.start * scale - 0.5), math.ceil(span.end * scale - 0.5)) for span in row.spans]


def _fits(naming: Naming, placed: list[list[Placed]]) -> bool:
    """Whether at least 9 of 10 actions have room for their name and a column between names."""
    found = [len(naming(action)) < behind - first for row in placed for action, first, behind in row]
    return sum(found) >= 0.9 * len(found)


def _line(placed: list[Placed], naming: Naming, columns: int) -> str:
    line = ["."] * columns
    for action, first, behind in placed:
        word, room = naming(action), behind - first
        line[first:behind] = (word if len(word) <= room else _letter(action)).ljust(room, "-")[:room]
    return "".join(line)
