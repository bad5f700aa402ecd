"""A trace in Chrome's format as slices that nest on their tracks. Times are microseconds on the trace's own clock."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from camshaft.profiling.intervals import Interval, union

PREFIX = "camshaft/"
WINDOW, PHASE, MODULE = f"{PREFIX}window", f"{PREFIX}phase/", f"{PREFIX}module/"
START, WAIT, BLOCKED = f"{PREFIX}start/", f"{PREFIX}wait/", f"{PREFIX}blocked"
"""Names of the ranges that ``recording`` makes: a window, a phase of it, a module's forward, the start of a collective
and the wait for it, and a thread that does nothing until a collective is over."""

_KERNELS = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
_HOST = frozenset({"cpu_op", "user_annotation"})
_UNNESTED = ("gloo:", "nccl:", "ProfilerStep")
Track = tuple[Any, Any]


@dataclass(slots=True, eq=False)
class Slice:
    """Something that took from ``start`` to ``end`` on ``track`` (process and thread, or device and stream)."""

    name: str
    category: str
    track: Track
    start: float
    end: float
    args: Mapping[str, Any] = field(default_factory=dict)
    parent: Slice | None = None
    """The slice around this one on its track."""
    inside: float = 0.0
    """Time of it that slices inside of it take."""

    @property
    def alone(self) -> float:
        """Time of it that no slice inside of it takes."""
        return max(self.end - self.start - self.inside, 0.0)

    @property
    def interval(self) -> Interval:
        return self.start, self.end

    def chain(self) -> Iterator[Slice]:
        """This slice, the one around it, and so on."""
        here: Slice | None = self
        while here is not None:
            yield here
            here = here.parent


class Allocation(NamedTuple):
    """Memory that was taken (``size`` > 0) or given back (< 0); ``total``: what the allocator then has given out."""

    time: float
    track: Track
    address: int
    size: int
    total: int
    device: int
    """0: the CPU's memory; 1: a GPU's, as in torch's ``DeviceType``."""


@dataclass(slots=True)
class Trace:
    """What one rank recorded. ``host`` are slices of threads, nested; ``kernels`` are a device's, which may overlap."""

    host: list[Slice]
    kernels: list[Slice]
    travelling: list[Slice]
    """Collectives under way on other threads, where the backend tells: they overlap with everything."""
    allocations: list[Allocation]
    windows: list[Slice] = field(init=False)
    """The windows that were recorded, in order."""
    bounds: list[Interval] = field(init=False)
    """When a window was under way."""

    def __post_init__(self) -> None:
        self.windows = [each for each in self.host if each.name == WINDOW]
        self.bounds = union(window.interval for window in self.windows)

    def named(self, prefix: str) -> list[Slice]:
        """Host slices whose name starts with ``prefix``, in order."""
        return [each for each in self.host if each.name.startswith(prefix)]


def read(path: Path) -> Trace:
    """The trace in a file.

    Raises:
        ValueError: it holds no trace, or no window of ours.
    """
    with path.open(encoding="utf-8") as file:
        return parse(json.load(file))


def parse(document: Mapping[str, Any]) -> Trace:
    """The trace in a document that is loaded already."""
    events = document.get("traceEvents")
    if not isinstance(events, list):
        raise ValueError("there are no traceEvents in it")
    slices = [_slice(event) for event in events if event.get("ph") == "X" and event.get("cat") in _HOST | _KERNELS]
    host = [each for each in slices if each.category in _HOST]
    nested = [each for each in host if not each.name.startswith(_UNNESTED)]
    nest(nested)
    trace = Trace(
        host=sorted(nested, key=lambda each: each.start),
        kernels=sorted((each for each in slices if each.category in _KERNELS), key=lambda each: each.start),
        travelling=[each for each in host if each.name.startswith("gloo:")],
        allocations=sorted(_allocations(events), key=lambda each: each.time),
    )
    if not trace.windows:
        raise ValueError("no window is recorded in it")
    return trace


def _slice(event: Mapping[str, Any]) -> Slice:
    start = float(event["ts"])
    track = (event.get("pid"), event.get("tid"))
    return Slice(event["name"], event["cat"], track, start, start + float(event.get("dur", 0.0)), event.get("args", {}))


def _allocations(events: Iterable[Mapping[str, Any]]) -> Iterator[Allocation]:
    for event in events:
        if event.get("ph") == "i" and event.get("name") == "[memory]":
            args = event["args"]
            yield Allocation(
                float(event["ts"]),
                (event.get("pid"), event.get("tid")),
                int(args["Addr"]),
                int(args["Bytes"]),
                int(args.get("Total Allocated", 0)),
                int(args.get("Device Type", 0)),
            )


def nest(slices: Iterable[Slice]) -> None:
    """Set ``parent`` and ``inside`` of slices, each on its track. One that ends after its parent is cut to it."""
    tracks: dict[Track, list[Slice]] = {}
    for each in slices:
        tracks.setdefault(each.track, []).append(each)
    for track in tracks.values():
        track.sort(key=lambda each: (each.start, -each.end))
        above: list[Slice] = []
        for each in track:
            while above and above[-1].end <= each.start:
                above.pop()
            if above:
                each.parent = above[-1]
                each.end = min(each.end, each.parent.end)
                each.parent.inside += each.end - each.start
            above.append(each)


class Finder:
    """Tells what was going on at a moment on a track."""

    def __init__(self, slices: Iterable[Slice]) -> None:
        self._tracks: dict[Track, list[Slice]] = {}
        for each in slices:
            self._tracks.setdefault(each.track, []).append(each)
        for track in self._tracks.values():
            track.sort(key=lambda each: (each.start, -each.end))
        self._starts = {name: [each.start for each in track] for name, track in self._tracks.items()}

    def at(self, track: Track, time: float) -> Slice | None:
        """The innermost slice around ``time``; None if there is none."""
        place = bisect_right(self._starts.get(track, []), time) - 1
        here: Slice | None = self._tracks[track][place] if place >= 0 else None
        while here is not None and here.end < time:
            here = here.parent
        return here
