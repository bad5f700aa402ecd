"""A process that kills itself at the k-th file-system operation, and what a power cut at that point would lose."""

from __future__ import annotations

import contextlib
import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from camshaft_checkpoint import files

OPERATIONS = ("make_directory", "write", "sync", "rename", "unlink", "remove_directory")


class Killer:
    """Wraps the operations of ``files`` and sends SIGKILL before the k-th, or in the middle of it if it is a write.

    ``power_cut`` also throws away what was not forced to the disk: contents of files, and new entries and renames whose
    directory was not synchronised after them. With ``sync_works`` off that is everything: a control.
    """

    def __init__(self, patch: pytest.MonkeyPatch, at: int, power_cut: bool = False, sync_works: bool = True) -> None:
        self.at, self.power_cut, self.sync_works, self.count = at, power_cut, sync_works, 0
        self.dirty: set[str] = set()
        self.entered: set[str] = set()
        self.written: set[str] = set()
        self.renamed: list[tuple[Path, Path]] = []
        self.operations = {name: getattr(files, name) for name in OPERATIONS}
        for name in OPERATIONS:
            patch.setattr(files, name, lambda *arguments, name=name: self._call(name, *arguments))

    def _call(self, name: str, *arguments: Any) -> Any:
        operation = self.operations[name]
        self.count += 1
        if self.count == self.at:
            if name == "write":
                operation(arguments[0], memoryview(arguments[1])[: len(arguments[1]) // 2])
                self._remember(name, *arguments)
            self._die()
        result = operation(*arguments)
        self._remember(name, *arguments)
        return result

    def _remember(self, name: str, *arguments: Any) -> None:
        if name == "make_directory":
            self.entered.add(str(arguments[0].resolve()))
        elif name == "write":
            path = _path(arguments[0])
            self.dirty.add(path)
            self.entered |= {path} - self.written
            self.written.add(path)
        elif name == "sync" and self.sync_works:
            path = _path(arguments[0])
            self.dirty.discard(path)
            self.entered = {entry for entry in self.entered if str(Path(entry).parent) != path}
            self.renamed = [pair for pair in self.renamed if str(pair[1].parent.resolve()) != path]
        elif name == "rename":
            source, target = (str(path.resolve()) for path in arguments)
            for paths in (self.dirty, self.entered):
                moved = {path for path in paths if path == source or path.startswith(source + "/")}
                paths -= moved
                paths |= {target + path[len(source) :] for path in moved}
            self.entered.discard(target)  # its entry is the old one under a new name
            self.renamed.append(arguments)  # type: ignore[arg-type]

    def _die(self) -> None:
        if self.power_cut:
            for path in self.dirty:
                with contextlib.suppress(FileNotFoundError):
                    os.truncate(path, 0)
            for path in self.entered:
                files.remove(Path(path))
            for source, target in reversed(self.renamed):
                with contextlib.suppress(OSError):
                    os.rename(target, source)
        os.kill(os.getpid(), signal.SIGKILL)


def _path(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


def killed_at(at: int, work: Callable[[], None], *, power_cut: bool = False, sync_works: bool = True) -> bool:
    """Fork, run ``work`` and die at operation ``at``. False when the work was done before it came to that."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            patch = pytest.MonkeyPatch()
            Killer(patch, at, power_cut, sync_works)
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    _, ended = os.waitpid(child, 0)
    assert os.WIFSIGNALED(ended) or os.WEXITSTATUS(ended) == 0, "the child failed by itself"
    return os.WIFSIGNALED(ended)
