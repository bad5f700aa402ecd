"""Lines of JSON that survive a killed writer, and the cut that makes a resumed run's file continuous."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
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

    Lines later than ``step`` go, at step 0 every line since nothing has been done yet: they are appended to
    ``<name>.cut.jsonl`` beside it, for a run may have started anew by mistake. Lines that are no JSON object (a writer
    killed in the middle of one) are dropped. The file is replaced in one rename, and not touched otherwise.

    Raises:
        OSError: the file cannot be read or replaced.
    """
    if not path.exists():
        return ""
    removed, torn = [], 0
    temporary = path.with_name(path.name + ".tmp")
    with path.open("rb") as source, temporary.open("wb") as target:
        for line, found in _lines(source):
            whole = line if line.endswith(b"\n") else line + b"\n"
            if found is None:
                torn += 1
            elif _is_later(found, step):
                removed.append(whole)
            else:
                target.write(whole)
        target.flush()
        os.fsync(target.fileno())
    if temporary.stat().st_size == path.stat().st_size:
        temporary.unlink()
        return ""
    aside = path.with_name(f"{path.stem}.cut{path.suffix}")
    if removed:
        _append(aside, removed)
    temporary.replace(path)
    return _note(len(removed), torn, step, aside.name)


def _append(path: Path, lines: Sequence[bytes]) -> None:
    with path.open("ab") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())


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


def _note(later: int, torn: int, step: int, aside: str) -> str:
    parts = [f"{later} line(s) after step {step} cut and kept in {aside}, the run repeats them"] if later else []
    parts += [f"{torn} incomplete line(s) dropped"] if torn else []
    return "; ".join(parts)
