"""A schedule as a Chrome trace, for Perfetto or chrome://tracing: simulated and measured as two processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from camshaft_pipeline.drawing import Measured, rows
from camshaft_pipeline.simulator import Span, Timeline

Event = dict[str, Any]


def draw(timeline: Timeline, measured: Measured | None = None, microseconds: float = 1e6) -> str:
    """The trace as JSON; ``microseconds`` is how many make one unit of the timeline (1e6: it is in seconds).

    Ranks are threads; transfers of the simulation are asynchronous events of their sender.
    """
    drawn = rows(timeline, measured)
    events = [_named("process_name", 0, 0, f"simulated {timeline.name}")]
    if measured is not None:
        events.append(_named("process_name", 1, 0, "measured"))
    for row in drawn:
        events.append(_named("thread_name", int(row.measured), row.rank, f"rank {row.rank}"))
        events += [_slice(span, int(row.measured), microseconds) for span in row.spans]
    for number, span in enumerate(timeline.transfers):
        events += _transfer(span, number, microseconds)
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": events}, separators=(",", ":"))


def _named(name: str, process: int, thread: int, value: str) -> Event:
    return {"ph": "M", "name": name, "pid": process, "tid": thread, "args": {"name": value}}


def _slice(span: Span, process: int, scale: float) -> Event:
    kind, microbatch, stage = span.action
    return {
        "ph": "X",
        "name": str(span.action),
        "cat": kind.value,
        "pid": process,
        "tid": span.rank,
        "ts": span.start * scale,
        "dur": (span.end - span.start) * scale,
        "args": {"microbatch": microbatch, "stage": stage},
    }


def _transfer(span: Span, number: int, scale: float) -> Iterator[Event]:
    for phase, moment in (("b", span.start), ("e", span.end)):
        yield {
            "ph": phase,
            "name": str(span.action),
            "cat": "transfer",
            "id": number,
            "pid": 0,
            "tid": span.rank,
            "ts": moment * scale,
        }
