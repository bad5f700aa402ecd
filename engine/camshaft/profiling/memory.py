"""The bytes that are held over the window, and whose they are at the peak.

From the allocator's own events in the trace: each tells address and size. What was there before the window is known by
the addresses of parameters, optimizer state, buffers and what plugins keep (``Held``); a gradient is what parameters
point at when gradients are complete; the rest is told by phase, module and operation at the time of its allocation.
Memory that a device's allocator counts and none of these explains is ``unknown``: libraries' workspaces, mostly.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from camshaft.profiling.trace import MODULE, PHASE, Allocation, Finder, Slice, Trace

PARAMETER, GRADIENT, STATE, ACTIVATION = "parameter", "gradient", "optimizer state", "activation"
MASTER, BUFFER, TEMPORARY, INPUT, UNKNOWN = "master weight", "buffer", "temporary", "input", "unknown"
_KIND = {"forward": ACTIVATION, "data": INPUT}
_NUMBER = re.compile(r"(?:^|(?<=\.)|(?<= of ))\d+(?=[. ]|$)")
POINTS = 400


@dataclass(frozen=True, slots=True)
class Held:
    """Memory that exists before the first recorded window."""

    address: int
    size: int
    category: str
    name: str


@dataclass(frozen=True, slots=True)
class Owner:
    """Bytes at the peak that belong together: ``count`` blocks; ``*`` in ``name`` is a number in which they differ."""

    category: str
    name: str
    size: int
    count: int


@dataclass(slots=True)
class Timeline:
    """Memory of one device over the recorded windows, in bytes."""

    device: str
    before: int
    """Held when the first window began."""
    peak: int = 0
    peak_time: float = 0.0
    """Microseconds after the first window began."""
    peak_phase: str = ""
    by_category: dict[str, int] = field(default_factory=dict)
    """At the peak."""
    owners: list[Owner] = field(default_factory=list)
    """At the peak, the largest first."""
    phases: dict[str, int] = field(default_factory=dict)
    """Most bytes during each phase."""
    points: list[tuple[float, int]] = field(default_factory=list)
    """(microseconds, bytes): the course, thinned out; each point is the most since the one before."""


@dataclass(slots=True)
class _Block:
    size: int
    category: str
    name: str
    born: int = -1
    """Place of the event that made it; -1: it was there before."""
    died: float = math.inf


def timeline(trace: Trace, held: Sequence[Held], gradients: Sequence[Mapping[int, str]] = ()) -> Timeline:
    """Follow every allocation; ``gradients[k]``: addresses that hold gradients at the start of the k-th ``clip``."""
    device = 1 if any(each.device for each in trace.allocations) else 0
    events = [each for each in trace.allocations if each.device == device]
    return _Follower(trace, events, held, gradients, device).run()


class _Follower:
    def __init__(
        self,
        trace: Trace,
        events: list[Allocation],
        held: Sequence[Held],
        gradients: Sequence[Mapping[int, str]],
        device: int,
    ) -> None:
        self._trace, self._events, self._device = trace, events, device
        self._finder = Finder(trace.host)
        self._modules = _modules(trace.host)
        self._live = {each.address: _Block(each.size, each.category, each.name) for each in held}
        self._blocks = list(self._live.values())
        self._sum = sum(block.size for block in self._live.values())
        self._marks = [(each.start, found) for each, found in zip(trace.named(f"{PHASE}clip"), gradients, strict=False)]
        self._main = trace.windows[0].track
        self._top = -1
        """Place of the event after which most was held."""

    def run(self) -> Timeline:
        first = self._trace.windows[0].start
        found = Timeline("cuda" if self._device else "cpu", self._sum, peak=self._sum)
        course: list[tuple[float, int]] = []
        begun = False
        for place, event in enumerate(self._events):
            self._name_gradients(event.time)
            self._take(event, place)
            if event.time < first:
                continue
            total = event.total if self._device else self._sum
            if not begun:
                begun, found.before, found.peak = True, total - event.size, 0
            course.append((event.time - first, total))
            if self._watch(found, event, total, first):
                self._top = place
        self._close(found)
        found.points = thin([(0.0, found.before), *course])
        return found

    def _name_gradients(self, now: float) -> None:
        while self._marks and self._marks[0][0] <= now:
            _, names = self._marks.pop(0)
            for address, name in names.items():
                block = self._live.get(address)
                if block is not None and block.category not in (PARAMETER, MASTER, STATE):
                    block.category, block.name = GRADIENT, name

    def _take(self, event: Allocation, place: int) -> None:
        old = self._live.pop(event.address, None)  # also where an allocation tells that a block before it has gone
        if old is not None:
            self._sum -= old.size
            old.died = place
        if event.size > 0:
            category, name = self._told(event)
            block = self._live[event.address] = _Block(event.size, category, name, place)
            self._blocks.append(block)
            self._sum += event.size

    def _told(self, event: Allocation) -> tuple[str, str]:
        here = self._finder.at(event.track, event.time)
        phase = self._phase(event, here)
        kind = _KIND.get(phase, TEMPORARY)
        chain = [] if here is None else list(here.chain())
        module = next((self._modules[id(each)] for each in chain if id(each) in self._modules), "")
        op = next((each.name for each in reversed(chain) if each.name.startswith("aten::")), "")
        if not op:
            op = next((each.name for each in chain if each.category == "cpu_op"), phase)
        return kind, f"{module} {op}".strip() if kind == ACTIVATION else f"{module} {op} ({phase})".strip()

    def _phase(self, event: Allocation, here: Slice | None) -> str:
        """Phase of the moment; autograd's threads have none of their own, so the main thread's counts there."""
        own = None if here is None else _phase_in(here)
        if own is None and event.track != self._main:
            main = self._finder.at(self._main, event.time)
            own = None if main is None else _phase_in(main)
        return own or "other"

    def _watch(self, found: Timeline, event: Allocation, total: int, first: float) -> bool:
        """Note the phase's most; whether this is the most of all so far."""
        here = self._finder.at(self._main, event.time)
        phase = (None if here is None else _phase_in(here)) or "other"
        found.phases[phase] = max(found.phases.get(phase, 0), total)
        if total <= found.peak:
            return False
        found.peak, found.peak_time, found.peak_phase = total, event.time - first, phase
        return True

    def _close(self, found: Timeline) -> None:
        self._name_gradients(float("inf"))
        blocks = [block for block in self._blocks if block.born <= self._top < block.died]
        rest = found.peak - sum(block.size for block in blocks)
        if self._device and rest > 0:
            blocks.append(_Block(rest, UNKNOWN, "counted by the allocator alone"))
        for block in blocks:
            found.by_category[block.category] = found.by_category.get(block.category, 0) + block.size
        found.owners = owners(blocks)


def _phase_in(here: Slice) -> str | None:
    return next((each.name.removeprefix(PHASE) for each in here.chain() if each.name.startswith(PHASE)), None)


def _modules(host: Sequence[Slice]) -> dict[int, str]:
    """Module of a slice, by identity: that of a range of ours, and in the backward that of its forward operation."""
    found: dict[int, str] = {}
    forward: dict[int, str] = {}
    for each in host:
        if each.name.startswith(MODULE):
            found[id(each)] = each.name.removeprefix(MODULE)
        number = each.args.get("Sequence number")
        if number is not None and not each.name.startswith("autograd::"):
            name = next((one.name for one in each.chain() if one.name.startswith(MODULE)), None)
            if name is not None:
                forward[number] = name.removeprefix(MODULE)
    for each in host:
        if each.name.startswith("autograd::") and each.args.get("Sequence number") in forward:
            found[id(each)] = forward[each.args["Sequence number"]]
    return found


def owners(blocks: Sequence[_Block]) -> list[Owner]:
    """Blocks of one category whose names differ in numbers alone, put together; the largest first."""
    grouped: dict[tuple[str, str], list[_Block]] = {}
    for block in blocks:
        grouped.setdefault((block.category, _NUMBER.sub("*", block.name)), []).append(block)
    found = [
        Owner(
            category,
            pattern if len({block.name for block in members}) > 1 else members[0].name,
            sum(block.size for block in members),
            len(members),
        )
        for (category, pattern), members in grouped.items()
    ]
    return sorted(found, key=lambda owner: (-owner.size, owner.category, owner.name))


def thin(course: list[tuple[float, int]], points: int = POINTS) -> list[tuple[float, int]]:
    """At most ``points`` + 1 of ``course``: the highest of each stretch, so that no peak is lost."""
    step = -(-len(course) // points)
    if step <= 1:
        return course
    return [max(course[start : start + step], key=lambda point: point[1]) for start in range(0, len(course), step)]
