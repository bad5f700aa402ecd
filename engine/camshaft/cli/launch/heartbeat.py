"""What each rank does right now, in a small file that the front reads: a slot a rank, written without system calls."""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path
from typing import NamedTuple

from camshaft.processes import Process, myself

PHASES = (
    "start", "connect", "data", "build", "load", "step", "forward", "backward", "reduce", "clip", "optimizer", "log",
    "evaluate", "save", "close", "end",
)  # fmt: skip
"""Names of what a rank can be doing. The place in this tuple is the code in the file."""

_IN_WORDS = {"start": "start-up", "connect": "the rendezvous", "step": "training", "log": "logging", "end": "its exit"}
_CODES = {name: code for code, name in enumerate(PHASES)}
_HEADER = struct.Struct("=8sqq48x")
_SLOT = struct.Struct("=qqqq32x")  # pid, start time, step, phase; a cache line a rank
_PROGRESS = struct.Struct("=qq")
_PROGRESS_OFFSET = 16
_MAGIC = b"camshaft"


def doing(phase: str) -> str:
    """A phase as it reads after "during"."""
    return _IN_WORDS.get(phase, phase)


class Beat(NamedTuple):
    """One rank's slot as the front sees it."""

    rank: int
    process: Process
    step: int
    phase: str


class Heartbeat:
    """The writing side. Until ``attach`` it writes to memory of its own, so that a rank needs no file to run."""

    def __init__(self) -> None:
        self._buffer: bytearray | mmap.mmap = bytearray(_SLOT.size)
        self._offset = _PROGRESS_OFFSET

    def attach(self, path: Path, rank: int) -> None:
        """Register this process as ``rank`` in the file that ``create`` made."""
        step, phase = _PROGRESS.unpack_from(self._buffer, self._offset)
        with path.open("r+b") as file:
            self._buffer = mmap.mmap(file.fileno(), 0)
        offset = _HEADER.size + rank * _SLOT.size
        self._offset = offset + _PROGRESS_OFFSET
        own = myself()
        # The pid goes in last: a slot with a pid is complete.
        struct.pack_into("=qqq", self._buffer, offset + 8, own.start, step, phase)
        struct.pack_into("=q", self._buffer, offset, own.pid)

    def beat(self, step: int, phase: str) -> None:
        """Say what is about to be done. ``step``: optimizer steps done; ``phase``: one of ``PHASES``."""
        _PROGRESS.pack_into(self._buffer, self._offset, step, _CODES.get(phase, 0))

    @property
    def progress(self) -> tuple[int, str]:
        """The last beat: step and phase."""
        step, code = _PROGRESS.unpack_from(self._buffer, self._offset)
        return step, PHASES[code]


def create(path: Path, world_size: int) -> None:
    """Make the file anew with ``world_size`` empty slots, readable by this user alone."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.unlink(missing_ok=True)
    partial.touch(mode=0o600, exist_ok=False)
    partial.write_bytes(_HEADER.pack(_MAGIC, 1, world_size) + bytes(world_size * _SLOT.size))
    partial.replace(path)  # a new inode: ranks of an earlier run cannot write into this one


def read(path: Path) -> list[Beat]:
    """Slots of the ranks that registered so far; empty when there is no such file."""
    try:
        content = path.read_bytes()
    except OSError:
        return []
    if len(content) < _HEADER.size or not content.startswith(_MAGIC):
        return []
    found = []
    for rank in range((len(content) - _HEADER.size) // _SLOT.size):
        pid, start, step, code = _SLOT.unpack_from(content, _HEADER.size + rank * _SLOT.size)
        if pid:
            found.append(Beat(rank, Process(pid, start), step, PHASES[code] if code < len(PHASES) else "?"))
    return found
