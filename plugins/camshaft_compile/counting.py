"""The one place that reads torch's private records of compilation, pinned by a test.

torch has no public way to ask what was compiled and why (TORCH_LOGS only writes text), so ``torch._dynamo.utils``'
``get_compilation_metrics`` (an entry for each frame, the last 64) and ``counters["graph_break"]`` are read here.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Events:
    """What was compiled between two looks."""

    graphs: int = 0
    """Frames that became graphs."""
    recompiles: list[str] = field(default_factory=list)
    """Why code that had a graph already got another one: the guards that failed."""
    breaks: list[str] = field(default_factory=list)
    """Why graphs ended early, one entry for each."""
    seconds: float = 0.0

    def __bool__(self) -> bool:
        """Whether anything happened."""
        return bool(self.graphs or self.recompiles or self.breaks)


class Counting:
    """Looks at torch's records and tells what is new. Nothing of torch's is reset."""

    def __init__(self) -> None:
        from torch._dynamo import utils

        self._utils: Any = utils
        self._last: Any = None
        self._breaks: Counter[str] = Counter()
        self.take()

    def take(self) -> Events:
        """What happened since the last look."""
        events = Events()
        for entry in self._new_entries():
            events.seconds += (entry.duration_us or 0) / 1e6
            if entry.is_forward is False:
                continue
            events.graphs += 1
            if entry.recompile_reason is not None:
                events.recompiles.append(_one_line(entry.recompile_reason))
        breaks: Counter[str] = Counter(self._utils.counters["graph_break"])
        events.breaks = [_one_line(reason) for reason in (breaks - self._breaks).elements()]
        self._breaks = breaks
        return events

    def _new_entries(self) -> list[Any]:
        entries: list[Any] = self._utils.get_compilation_metrics()
        places = [place for place, entry in enumerate(entries) if entry is self._last]
        if entries:
            self._last = entries[-1]
        return entries[places[-1] + 1 :] if places else entries


def _one_line(reason: str) -> str:
    """The first lines of a reason, as one."""
    return " ".join(reason.split())[:300]
