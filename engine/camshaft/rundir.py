"""The folder of one run: where it is, what is in it, and who may write to it now."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from camshaft.errors import MachineError
from camshaft.recipe.schema import Run

UNFINISHED = ("running", "interrupted", "failed")
"""States of a run that the same command continues. A killed run still says ``running``."""

_CHECKPOINT = re.compile(r"step_\d+")
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")


def utc_now() -> str:
    """The time as ISO 8601 in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


class RunDirectory:
    """Paths and small files of a run. Constructing it touches nothing; ``create`` makes the folders.

    ``root`` is the folder that no symbolic link on the way may leave; by default the run's own.
    """

    def __init__(self, path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> None:
        self.path = Path(path)
        self._root = Path(root) if root is not None else self.path
        self.checkpoints = self.path / "checkpoints"
        self.logs = self.path / "logs"
        self.metrics = self.path / "metrics.jsonl"
        self.heartbeat = self.path / "heartbeat"

    def __repr__(self) -> str:
        return f"RunDirectory({str(self.path)!r})"

    @property
    def id(self) -> str:
        """The run's name among runs of its recipe, kept in status.json."""
        return str(self.read_status().get("id") or self.path.resolve().name)

    def create(self) -> RunDirectory:
        """Make the folders that are not there.

        Raises:
            MachineError: one cannot be made, or is a symbolic link to somewhere outside the root.
        """
        try:
            for folder in (self.path, self.checkpoints, self.logs):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MachineError(
                f"the run directory {self.path} cannot be made: {error}. Set run.root or run.dir to a writable place"
            ) from error
        root = self._root.resolve()
        for folder in (self.path, self.checkpoints, self.logs):
            if not folder.resolve().is_relative_to(root):
                raise MachineError(f"{folder} is a link to {folder.resolve()}, outside {root}. Remove the link")
        return self

    def read_status(self) -> dict[str, Any]:
        """The content of status.json; empty if there is none, or none that can be read."""
        try:
            found = json.loads((self.path / "status.json").read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def write_status(self, **fields: Any) -> None:
        """Change these fields of status.json and keep the others; readers see the old file or the new one, whole."""
        status = {"id": self.path.resolve().name, **self.read_status(), **fields}
        _replace(self.path / "status.json", json.dumps(status, indent=2) + "\n")

    def keep(self, name: str, text: str) -> Path:
        """Write a file of the start unless it is there; different text goes beside it, with the time in its name."""
        path = self.path / name
        if not path.exists():
            _replace(path, text)
        elif path.read_text(encoding="utf-8") != text:
            path = path.with_name(f"{path.stem}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}{path.suffix}")
            _replace(path, text)
        return path

    def going_on(self) -> str:
        """What the same command does after this run was ended from outside, for the end of an error's text."""
        if any(_CHECKPOINT.fullmatch(path.name) for path in self.checkpoints.glob("step_*")):
            return "The same command, without --fresh, continues from the last checkpoint"
        return "There is no checkpoint yet: the same command starts again from step 0"

    def lock(self) -> Lock:
        """Claim the folder for this process until it ends, however it ends.

        Raises:
            MachineError: another process has it; names the process.
        """
        return Lock(self.path)


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


class Lock:
    """An exclusive lock on a run directory. The kernel frees it when its holder ends."""

    def __init__(self, folder: Path) -> None:
        try:
            self._file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise MachineError(f"{folder} cannot be locked: {error}. Give another run.dir or run.root") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._file, 32, 0).decode(errors="replace").strip() or "?"
            os.close(self._file)
            raise MachineError(
                f"{folder} is in use by process {holder}. Wait for its end, stop it (kill -TERM {holder}), "
                "or give another run.dir"
            ) from error
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Let others have the folder."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


@dataclass(frozen=True, slots=True)
class Choice:
    """A run directory that is made and locked, and what to tell about it."""

    directory: RunDirectory
    lock: Lock
    continued: bool
    message: str


def digest(values: dict[str, Any]) -> str:
    """Digest of a resolved recipe without its ``run`` section: equal for runs that can continue one another."""
    content = {key: value for key, value in values.items() if key != "run"}
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()  # unsorted: the order of plugins counts


def choose(run: Run, name: str, recipe_digest: str, *, fresh: bool = False) -> Choice:
    """Pick the directory of a run: exactly ``run.dir``, the unfinished latest run of the same recipe, or a new one.

    Raises:
        MachineError: the directory is in use or cannot be made, or ``fresh`` was asked for one that holds a run.
    """
    if run.dir is not None:
        return _exactly(RunDirectory(run.dir), fresh)
    if not _NAME.fullmatch(name):
        raise MachineError(f"the run name {name!r} cannot be a folder name")
    home = Path(run.root) / name
    if not fresh:
        for choice in _latest(home, Path(run.root), recipe_digest):
            return choice
    return _new(home, Path(run.root))


def _exactly(directory: RunDirectory, fresh: bool) -> Choice:
    continued = bool(directory.read_status())
    if fresh and continued:
        raise MachineError(f"--fresh, but {directory.path} holds a run already. Give another run.dir")
    lock = directory.create().lock()
    what = "continuing the run in" if continued else "run directory"
    return Choice(directory, lock, continued, f"{what} {directory.path}")


def _latest(home: Path, root: Path, recipe_digest: str) -> Iterator[Choice]:
    """The latest run, if it can be continued by the same command and nobody else has it."""
    with contextlib.suppress(OSError):
        target = str((home / "latest").readlink())
        directory = RunDirectory(home / target, root)
        status = directory.read_status() if _NAME.fullmatch(target) else {}
        if status.get("state") in UNFINISHED and status.get("digest") == recipe_digest:
            with contextlib.suppress(MachineError):
                lock = directory.create().lock()
                yield Choice(
                    directory,
                    lock,
                    True,
                    f"continuing {directory.path} ({status['state']}); --fresh starts a new run instead",
                )


def _new(home: Path, root: Path) -> Choice:
    while True:
        identity = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"
        directory = RunDirectory(home / identity, root)
        if not directory.path.exists():
            break
    lock = directory.create().lock()
    point_latest(home, identity)
    return Choice(directory, lock, False, f"run directory {directory.path}")


def point_latest(home: Path, identity: str) -> None:
    """Point ``home/latest`` at ``identity``, relative, in one step."""
    partial = home / f".latest.{os.getpid()}"
    partial.unlink(missing_ok=True)
    partial.symlink_to(identity)
    partial.replace(home / "latest")
