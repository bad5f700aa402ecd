"""Drawings of a schedule on its clock, alone or with what was measured: terminal, SVG, trace."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from camshaft.program import COMPUTE, Action, Kind
from camshaft_pipeline.errors import ScheduleError
from camshaft_pipeline.simulator import Span, Timeline

Measured = Iterable[tuple[int, Action, float, float]]
"""(rank, action, start, end) of what ran, on any clock with the simulation's unit; transfers are left out."""


@dataclass(frozen=True)
class Row:
    """One line of a drawing: what a rank computes, simulated or measured."""

    rank: int
    measured: bool
    spans: tuple[Span, ...]


def rows(timeline: Timeline, measured: Measured | None = None) -> list[Row]:
    """A row for each rank, and below it what was measured, moved so that its first action starts at 0.

    Raises:
        ScheduleError: the measurement names a rank that the schedule does not have.
    """
    ranks = len(timeline.spans)
    found: list[list[Span]] = [[] for _ in range(ranks)]
    spans = [Span(*span) for span in measured or () if span[1].kind in COMPUTE]
    zero = min((span.start for span in spans), default=0)
    for span in spans:
        if not 0 <= span.rank < ranks:
            raise ScheduleError(f"measured {span.action} on rank {span.rank}, and the schedule has {ranks} ranks")
        found[span.rank].append(span._replace(start=span.start - zero, end=span.end - zero))
    drawn = []
    for rank, simulated in enumerate(timeline.spans):
        drawn.append(Row(rank, False, simulated))
        if measured is not None:
            drawn.append(Row(rank, True, tuple(sorted(found[rank], key=lambda span: span.start))))
    return drawn


def length(drawn: Sequence[Row]) -> float:
    """When the last action of all rows ends."""
    return max((span.end for row in drawn for span in row.spans), default=0)


def kinds(drawn: Sequence[Row]) -> list[Kind]:
    """The kinds of computation that occur."""
    present = {span.action.kind for row in drawn for span in row.spans}
    return [kind for kind in COMPUTE if kind in present]


def headline(timeline: Timeline, drawn: Sequence[Row]) -> str:
    """Name, makespan, bubble and the most activations; and how much longer the measured one took."""
    text = (
        f"{timeline.name}, {len(timeline.spans)} rank(s): {timeline.makespan:.6g}, of which bubble {timeline.idle:.6g} "
        f"({100 * timeline.bubble:.1f} % of the ideal); up to {max(timeline.peak)} activations a rank"
    )
    took = length([row for row in drawn if row.measured])
    if took and timeline.makespan:
        text += f"; measured {took:.6g}, {took / timeline.makespan:.3f} x"
    return text
