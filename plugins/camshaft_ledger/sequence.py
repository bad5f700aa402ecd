"""What this rank has called, in order: the last few steps in full, and a rolling hash of all of it per axis."""

from __future__ import annotations

import json
import zlib
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class Entry(NamedTuple):
    """One call, as it must be equal on all ranks of its group. ``elements`` is 0 where ranks may differ."""

    plugin: str
    hook: str
    axis: str
    op: str
    dtype: str
    elements: int


Groups = Mapping[str, tuple[int, ...]]
"""Name of an axis to the global ranks of this rank's group along it."""


@dataclass(frozen=True)
class Record:
    """The last steps of one rank, for others to compare."""

    steps: tuple[tuple[int, tuple[Entry, ...]], ...]
    """(step, its calls), oldest first; the last one is under way."""
    groups: Groups
    ended: str = ""
    """``finished`` when the run is over on this rank, ``failed`` when it ends with an error."""

    def dump(self) -> str:
        """As text for the store: every distinct entry once."""
        table = list(dict.fromkeys(entry for _, entries in self.steps for entry in entries))
        place = {entry: index for index, entry in enumerate(table)}
        steps = [(step, [place[entry] for entry in entries]) for step, entries in self.steps]
        return json.dumps({"table": table, "steps": steps, "groups": dict(self.groups), "ended": self.ended})

    @classmethod
    def parse(cls, text: str) -> Record:
        """What ``dump`` wrote."""
        found: dict[str, Any] = json.loads(text)
        table = [Entry(*fields) for fields in found["table"]]
        steps = tuple((step, tuple(table[index] for index in entries)) for step, entries in found["steps"])
        return cls(steps, {name: tuple(ranks) for name, ranks in found["groups"].items()}, found["ended"])


class Sequence:
    """Calls are added by the thread that makes them, and read by others: so a step's list only grows."""

    def __init__(self, groups: Groups, keep_steps: int) -> None:
        self.groups = groups
        self.moves = 0
        """Grows with every call and every step."""
        self.ended = ""
        self.hashes = dict.fromkeys(groups, 0)
        self._counts = dict.fromkeys(groups, 0)
        self._marks: dict[Entry, int] = {}
        self._steps: deque[tuple[int, list[Entry]]] = deque([(0, [])], maxlen=keep_steps)
        self._open = self._steps[-1][1]

    def begin(self, step: int) -> None:
        """The first step is ``step``; what was called before belongs to it."""
        self._steps[-1] = (step, self._open)

    def add(self, entry: Entry) -> tuple[int, int]:
        """Note a call; its number among calls on its axis, from 1, and its fingerprint in 32 bits."""
        mark = self._marks.get(entry)
        if mark is None:
            mark = self._marks[entry] = zlib.crc32(repr(tuple(entry)).encode())
        axis = entry.axis
        self.hashes[axis] = (self.hashes[axis] * 1000003 ^ mark) & 0x7FFFFFFFFFFFFFFF
        self._counts[axis] += 1
        self._open.append(entry)
        self.moves += 1
        return self._counts[axis], mark

    def end_step(self) -> None:
        """The step under way is over."""
        step = self._steps[-1][0]
        self._open = []
        self._steps.append((step + 1, self._open))
        self.moves += 1

    def end(self, status: str = "finished") -> None:
        """Nothing more will be called."""
        self.ended = status
        self.moves += 1

    def record(self) -> Record:
        """A copy of the last steps."""
        steps = tuple((step, tuple(entries)) for step, entries in list(self._steps))
        return Record(steps, self.groups, self.ended)
