"""What one rank's trace says, as plain data: what ``profile.json`` holds for each rank."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median_low
from typing import Any

from camshaft.datasheet import peak
from camshaft.profiling.exposed import Exposed, exposed
from camshaft.profiling.memory import Held, Timeline, timeline
from camshaft.profiling.times import phases, ranges, spent
from camshaft.profiling.trace import Trace, parse

OPERATIONS, OWNERS = 60, 10


def examine(path: Path, held: Sequence[Held], gradients: Sequence[Mapping[int, str]]) -> dict[str, Any]:
    """Read a rank's trace, write the course of its memory into it as a counter, and return the findings.

    Times are milliseconds a window, bytes are of one rank.
    """
    document = json.loads(path.read_text(encoding="utf-8"))
    trace = parse(document)
    course = timeline(trace, held, gradients)
    document["traceEvents"] += counters(trace, course)
    path.write_text(json.dumps(document, separators=(",", ":")), encoding="utf-8")
    return {**_times(trace), "communication": _communication(exposed(trace), trace), "memory": _memory(course)}


def counters(trace: Trace, course: Timeline) -> list[dict[str, Any]]:
    """The memory's course as counter events, which viewers draw as a curve."""
    window = trace.windows[0]
    return [
        {
            "ph": "C",
            "name": f"memory ({course.device})",
            "pid": window.track[0],
            "ts": window.start + time,
            "args": {"bytes": size},
        }
        for time, size in course.points
    ]


def _times(trace: Trace) -> dict[str, Any]:
    found, windows = spent(trace), len(trace.windows)
    scale = 1e-3 / windows
    largest = sorted(found.operations.items(), key=lambda item: -item[1][0])[:OPERATIONS]
    return {
        "windows": windows,
        "window_ms": found.window * scale,
        "measured_on": "device" if trace.kernels else "host",
        "phases_ms": {name: time * scale for name, time in phases(trace).items()},
        "groups_ms": {name: time * scale for name, time in found.groups.items()},
        "operations": [
            {"group": group, "name": name, "ms": time * scale, "calls": calls / windows}
            for (group, name), (time, calls) in largest
        ],
        "ranges": [
            {"name": name, "ms": time * scale, "calls": calls / windows}
            for name, (time, calls) in ranges(trace).items()
        ],
    }


def _communication(found: Exposed, trace: Trace) -> dict[str, Any]:
    scale = 1e-3 / len(trace.windows)
    owners = sorted(found.by_owner.items(), key=lambda item: -item[1])
    return {
        "under_way_ms": found.under_way * scale,
        "exposed_ms": found.exposed * scale,
        "exposed_by_owner_ms": {name: time * scale for name, time in owners},
    }


def _memory(course: Timeline) -> dict[str, Any]:
    return {
        "device": course.device,
        "before_bytes": course.before,
        "peak_bytes": course.peak,
        "peak_ms": course.peak_time / 1e3,
        "peak_phase": course.peak_phase,
        "peak_by_category": course.by_category,
        "largest_owners": [
            {"category": each.category, "name": each.name, "bytes": each.size, "blocks": each.count}
            for each in course.owners[:OWNERS]
        ],
        "most_in_phase": course.phases,
        "timeline": [[round(time / 1e3, 4), size] for time, size in course.points],
    }


def utilisation(flops_per_token: float, tokens_per_s: float, devices: int, device: str, kind: str) -> dict[str, Any]:
    """Model FLOP/s utilisation: the model's operations (Chowdhery et al. 2022, appendix B) over the devices' peak.

    ``tokens_per_s`` of all ``devices``; ``kind`` of matrix products. ``mfu`` is None, with ``reason``, where no data
    sheet tells the peak.
    """
    achieved = flops_per_token * tokens_per_s / devices
    most = peak(device, kind)
    told: dict[str, Any] = {
        "flops_per_token": flops_per_token,
        "tokens_per_s": tokens_per_s,
        "flops_per_s_per_device": achieved,
        "device": device,
        "type": kind,
        "peak_flops_per_s": most,
        "mfu": None if most is None else achieved / most,
    }
    if most is None:
        told["reason"] = f"no data sheet in the table tells a peak of '{device}' in {kind}"
    return told


def plain_seconds(windows: Sequence[float]) -> float | None:
    """Seconds of a window without the profiler: the median, without the first, which sets things up. None if alone.

    Of two the shorter one: the second window of a run is the one that compiles.
    """
    return median_low(windows[1:]) if len(windows) > 1 else None
