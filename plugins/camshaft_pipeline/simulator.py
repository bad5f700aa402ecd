"""What a schedule costs: when each action starts and ends, how long ranks are idle, what they hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from camshaft.program import COMPUTE, Action
from camshaft_pipeline.checker import live_activations
from camshaft_pipeline.replay import SENDS, Times, replay
from camshaft_pipeline.schedule import Schedule, message


class Span(NamedTuple):
    """One computation, or one transfer as its sender says it; times in the unit of ``Times``."""

    rank: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A schedule on a clock that starts at 0. ``spans[rank]`` are computations, in order; ``transfers`` messages."""

    name: str
    spans: tuple[tuple[Span, ...], ...]
    transfers: tuple[Span, ...]
    peak: tuple[int, ...]
    """The most activations that each rank holds at once, each of one microbatch in one stage."""

    @property
    def makespan(self) -> float:
        """When the last rank is done."""
        return max(spans[-1].end for spans in self.spans)

    @property
    def busy(self) -> tuple[float, ...]:
        """How long each rank computes."""
        return tuple(sum(span.end - span.start for span in spans) for spans in self.spans)

    @property
    def ideal(self) -> float:
        """The makespan if the rank with the most work never waited: no order of the same stages is faster."""
        return max(self.busy)

    @property
    def idle(self) -> float:
        """How much longer than the ideal the window takes."""
        return self.makespan - self.ideal

    @property
    def bubble(self) -> float:
        """``idle`` as a fraction of the ideal: (p - 1) / m for 1F1B. Counts ranks as waiting for the last one."""
        return self.idle / self.ideal if self.ideal else 0.0

    @property
    def stretch(self) -> float:
        """The longest time from a rank's first action to its last: the zero-bubble papers' cost of a window.

        It is what a window takes where the next one starts on each rank as soon as that rank is done, without a
        global norm in between.
        """
        return max(spans[-1].end - spans[0].start for spans in self.spans)


def simulate(schedule: Schedule, times: Times | None = None) -> Timeline:
    """Run ``schedule`` on a clock. Receives are posted early: only computations wait for what arrives.

    Raises:
        ScheduleError: times do not fit the stages, or some ranks wait for one another.
    """
    clock = replay(schedule.placement, schedule.programs, times)
    spans, transfers = [], []
    for rank, program in enumerate(schedule.programs):
        done = zip(program, clock.starts[rank], clock.ends[rank], strict=True)
        spans.append(tuple(Span(rank, action, start, end) for action, start, end in done if action.kind in COMPUTE))
        for action in program:
            if action.kind in SENDS:
                carried = message(action)
                transfers.append(Span(rank, action, clock.sent[carried], clock.arrived[carried]))
    peak = tuple(live_activations(program) for program in schedule.programs)
    return Timeline(schedule.name, tuple(spans), tuple(transfers), peak)
