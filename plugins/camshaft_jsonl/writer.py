"""Lines of JSON that survive a killed writer, and the cut that makes a resumed run's file continuous."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

STEP = "progress/global_step"


def encode(record: Mapping[str, Any]) -> bytes:
    """One line with its end. Floats are written with the shortest digits that read back as the same float64."""
    values = {key: _plain(value) for key, value in record.items()}
    return json.dumps(values, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def _plain(value: Any) -> Any:
    if isinstance(value, int | str):
        return value
    number = float(value)
    return number if math.isfinite(number) else str(number)


class Writer:
    """Appends whole lines, each with one ``write`` of the operating system: no buffer of ours can be lost or torn.

    Raises:
        OSError: the file cannot be opened, or a line cannot be written. The file then ends where it ended before.
    """

    def __init__(self, path: Path, *, fsync_every_s: float) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._fsync_every_s = fsync_every_s
        self._synced = time.monotonic()

    def write(self, record: Mapping[str, Any]) -> None:
        line = encode(record)
        end = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, line)
            if written < len(line):
                raise OSError(f"only {written} of {len(line)} bytes fit")
        except OSError:
            with suppress(OSError):  # a torn line would hide the next good one
                os.ftruncate(self._file, end)
            raise
        if time.monotonic() - self._synced >= self._fsync_every_s:
            self._synced = time.monotonic()
            os.fsync(self._file)

    def close(self) -> None:
        try:
            os.fsync(self._file)
        finally:
            os.close(self._file)


def cut(path: Path, step: int) -> str:
    """Keep what a run at ``step`` has really done, and say what went; ``""`` when the file stays as it is.

    Lines later than ``step`` go, and lines that are no JSON object (a writer killed in the middle of one). At step 0
    nothing has been done yet, so every line goes. The file is replaced in one rename, and not touched otherwise.

    Raises:
        OSError: the file cannot be read or replaced.
    """
    if not path.exists():
        return ""
    later = torn = 0
    temporary = path.with_name(path.name + ".tmp")
    with path.open("rb") as source, temporary.open("wb") as target:
        for line, found in _lines(source):
            later += found is not None and _is_later(found, step)
            torn += found is None
            if found is not None and not _is_later(found, step):
                target.write(line if line.endswith(b"\n") else line + b"\n")
        target.flush()
        os.fsync(target.fileno())
    if temporary.stat().st_size == path.stat().st_size:
        temporary.unlink()
        return ""
    temporary.replace(path)
    return _note(later, torn, step)


def _lines(source: Iterator[bytes]) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    for line in source:
        try:
            found = json.loads(line)
        except ValueError:  # also bytes that are no UTF-8
            found = None
        known = isinstance(found, dict) and isinstance(found.get(STEP, 0), int | float)
        yield line, found if known else None


def _is_later(record: Mapping[str, Any], step: int) -> bool:
    return step == 0 or int(record.get(STEP, 0)) > step


def _note(later: int, torn: int, step: int) -> str:
    parts = [f"{later} line(s) after step {step} cut, the run repeats them"] if later else []
    parts += [f"{torn} incomplete line(s) dropped"] if torn else []
    return "; ".join(parts)
