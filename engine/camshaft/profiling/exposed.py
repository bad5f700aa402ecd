"""Communication that no computation of the same rank hides.

On a device: times at which a collective's kernel runs and no other kernel does. Copies count as computation: they are
work that goes on meanwhile. On a CPU: times at which the rank's thread is blocked in the wait for a collective, or busy
with starting one, while no operation runs on any other thread; what the backend's own threads move beside computation
is hidden.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from camshaft.profiling.intervals import Interval, clip, length, subtract, union
from camshaft.profiling.trace import BLOCKED, START, WAIT, Slice, Trace, Track

_COLLECTIVE = re.compile(r"nccl|rccl", re.IGNORECASE)
_NO_COMPUTATION = re.compile(r"^(c10d::|record_param_comms|_c10d_functional::|nccl:|gloo:)")
UNKNOWN = "another library"


@dataclass(frozen=True, slots=True)
class Exposed:
    """Microseconds over all recorded windows."""

    under_way: float
    """At least one collective was on its way."""
    exposed: float
    """Of these, those that nothing hid."""
    by_owner: dict[str, float]
    """Exposed time by ``plugin/hook/operation/axis``. Where two collectives are exposed at once both have it."""


def exposed(trace: Trace) -> Exposed:
    """What collectives of the windows cost beyond computation."""
    return _on_device(trace) if trace.kernels else _on_host(trace)


def _on_device(trace: Trace) -> Exposed:
    collectives = [kernel for kernel in trace.kernels if _COLLECTIVE.search(kernel.name)]
    others = [kernel.interval for kernel in trace.kernels if not _COLLECTIVE.search(kernel.name)]
    launchers = {each.args["External id"]: each for each in trace.host if "External id" in each.args}
    owned = [(_owner(launchers.get(kernel.args.get("External id")), START), kernel.interval) for kernel in collectives]
    return _sum(trace, owned, owned, union(others))


def _on_host(trace: Trace) -> Exposed:
    calls = [(_owner(each, WAIT, START), each.interval) for each in trace.host if _communicates(each)]
    moving = [(UNKNOWN, each.interval) for each in trace.travelling]
    return _sum(trace, calls, [*calls, *moving], _host_work(trace))


def _communicates(each: Slice) -> bool:
    return each.name == BLOCKED or _NO_COMPUTATION.match(each.name) is not None


def _host_work(trace: Trace) -> list[Interval]:
    """When a thread is inside of an operation, without collectives inside of that (of a hook, for example)."""
    working: dict[Track, list[Interval]] = {}
    blocked: dict[Track, list[Interval]] = {}
    for each in trace.host:
        if _communicates(each):
            blocked.setdefault(each.track, []).append(each.interval)
        elif each.category == "cpu_op":
            working.setdefault(each.track, []).append(each.interval)
    spans = (subtract(union(found), union(blocked.get(track, ()))) for track, found in working.items())
    return union(interval for span in spans for interval in span)


def _owner(each: Slice | None, *prefixes: str) -> str:
    """Label of the range around a slice that says whose collective it is."""
    for one in () if each is None else each.chain():
        for prefix in prefixes:
            if one.name.startswith(prefix):
                return one.name.removeprefix(prefix)
    return UNKNOWN


def _sum(
    trace: Trace, owned: list[tuple[str, Interval]], moving: Iterable[tuple[str, Interval]], work: list[Interval]
) -> Exposed:
    bounds = trace.bounds
    by_owner = {}
    for owner in dict.fromkeys(owner for owner, _ in owned):
        mine = clip((interval for name, interval in owned if name == owner), bounds)
        by_owner[owner] = length(subtract(mine, work))
    bare = clip((interval for _, interval in owned), bounds)
    return Exposed(
        under_way=length(clip((interval for _, interval in moving), bounds)),
        exposed=length(subtract(bare, work)),
        by_owner=by_owner,
    )
