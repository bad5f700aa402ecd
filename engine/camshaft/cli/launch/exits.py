"""How a rank ended: the record it leaves, and which of many records tells the cause."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from camshaft.errors import CamshaftError, OutOfMemory
from camshaft.processes import Process, myself

Kind = Literal["end", "error", "connection", "orphan", "forced"]
"""``end``: came to its end or was asked to stop; ``error``: failed by itself; the others follow from other ends.

``connection``: a peer was gone; ``orphan``: its launcher or front was gone; ``forced``: could not stop in time.
"""

_PEER_IS_GONE = re.compile(
    r"connection (?:was )?(?:closed|reset|refused)|broken pipe|socket (?:is )?closed|timed out waiting|"
    r"remote (?:process|end)|nccl (?:communicator was aborted|remote error)|ncclremoteerror|"
    r"application timeout caused pair closure|watchdog caught collective operation timeout|"
    r"could not meet the other ranks|recvvaluefailed|failed to recv",
    re.IGNORECASE,
)
_OUT_OF_MEMORY = re.compile(
    r"can't allocate memory|cannot allocate memory|out of memory|failed to map segment", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class ExitRecord:
    """What a rank writes to ``logs/rank_N.exit.json`` before it ends. ``time`` is in seconds since 1970."""

    rank: int
    pid: int
    start: int
    status: int
    kind: Kind
    error: str
    step: int
    phase: str
    time: float

    @property
    def process(self) -> Process:
        return Process(self.pid, self.start)


def record_path(logs: Path, rank: int) -> Path:
    return logs / f"rank_{rank}.exit.json"


def make_record(rank: int, status: int, kind: Kind, error: str, progress: tuple[int, str]) -> ExitRecord:
    """A record of this process."""
    return ExitRecord(rank, *myself(), status, kind, error, *progress, time.time())


def write_record(logs: Path, record: ExitRecord) -> None:
    """Write the record whole or not at all."""
    path = record_path(logs, record.rank)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(asdict(record)) + "\n")
    partial.replace(path)


def read_record(logs: Path, rank: int, process: Process) -> ExitRecord | None:
    """The record that exactly ``process`` left as ``rank``, not one of an earlier run."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        record = ExitRecord(**json.loads(record_path(logs, rank).read_text()))
        if record.process == process:
            return record
    return None


def chain(error: BaseException) -> list[BaseException]:
    """An error and the errors that it was made from, the last one first."""
    found: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in found:
        found.append(link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return found


def classify(error: BaseException) -> tuple[int, Kind]:
    """Exit status and kind of an error; looks through the errors that plugins' errors were made from."""
    links = chain(error)
    if any(_is_out_of_memory(one) for one in links):
        return OutOfMemory.exit_status, "error"
    if any(_PEER_IS_GONE.search(str(one)) for one in links if isinstance(one, (RuntimeError, OSError, CamshaftError))):
        return error.exit_status if isinstance(error, CamshaftError) else 1, "connection"
    if isinstance(error, CamshaftError):
        return error.exit_status, "error"
    return 1, "error"


def is_out_of_memory(text: str) -> bool:
    """Whether a message, or the end of a log, is of memory that ran out."""
    return "MemoryError" in text or _OUT_OF_MEMORY.search(text) is not None


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, OutOfMemory)):
        return True
    # ImportError: the loader's, of a library that no room was found for
    return isinstance(error, (RuntimeError, OSError, ImportError)) and _OUT_OF_MEMORY.search(str(error)) is not None
