"""A folder that is worth keeping only if what it was made for succeeds."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from camshaft.errors import Interrupted, RecipeError
from camshaft.rundir import Choice, RunDirectory

LOGS = "logs"


class Scratch:
    """A new folder at ``path``, or the one there that is empty or has nothing but logs of an attempt that failed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._taken = False
        self._before: frozenset[Path] = frozenset()

    @property
    def usable(self) -> bool:
        """Whether nothing would be overwritten."""
        if not self.path.exists():
            return True
        return self.path.is_dir() and {each.name for each in self.path.iterdir()} <= {LOGS}

    def take(self, message: str) -> Choice:
        """Make and lock it; ``message`` tells of it.

        Raises:
            MachineError: it cannot be made, or another process has it.
        """
        self._before = frozenset(each for each in (self.path, *self.path.parents) if each.exists())
        directory = RunDirectory(self.path).create()
        lock = directory.lock()
        self._taken = True
        return Choice(directory, lock, False, message)

    def give_up(self, error: BaseException) -> None:
        """Nothing comes of it, because of ``error``: remove what is in it, and the folder if it was made for this.

        Logs stay where they may tell why: unless the recipe was refused, or the user ended it.
        """
        if isinstance(error, (RecipeError, Interrupted, KeyboardInterrupt)):
            self.remove()
        else:
            self._empty({LOGS})

    def remove(self) -> None:
        """Everything in it, and all folders that were made for it."""
        if not self._taken:
            return
        self._empty(set())
        for each in (self.path, *self.path.parents):
            if each in self._before:
                return
            with contextlib.suppress(OSError):  # somebody else uses it meanwhile
                each.rmdir()

    def _empty(self, but: set[str]) -> None:
        if not self._taken:
            return
        for each in list(self.path.iterdir()) if self.path.is_dir() else []:
            if each.name in but:
                continue
            if each.is_dir() and not each.is_symlink():
                shutil.rmtree(each, ignore_errors=True)
            else:
                each.unlink(missing_ok=True)
