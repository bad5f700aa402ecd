"""The few file-system operations that a checkpoint is made of, and the order that makes them safe.

Every change on disk goes through the operations of the first half, so that a test can stop a save before, and in the
middle of, each one of them. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from camshaft.errors import MachineError

BLOCK = 64 << 20
"""Bytes handed to one write or hash call."""

Data = bytes | bytearray | memoryview


def make_directory(path: Path) -> None:
    """Create one directory. Raises OSError when it exists."""
    path.mkdir()


def write(descriptor: int, data: Data) -> None:
    """Write all of ``data``; the system may take it in several parts."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def sync(descriptor: int) -> None:
    """Force a file's contents, or a directory's entries, to the disk."""
    os.fsync(descriptor)


def rename(source: Path, target: Path) -> None:
    """Rename within one file system: readers see the old entry or the new one, nothing between."""
    source.rename(target)


def unlink(path: Path) -> None:
    """Remove one file or symbolic link."""
    path.unlink()


def remove_directory(path: Path) -> None:
    """Remove one empty directory."""
    path.rmdir()


@dataclass(frozen=True, slots=True)
class Record:
    """A finished file: its name inside the checkpoint, size in bytes, and the SHA-256 of its contents in hex."""

    name: str
    size: int
    sha256: str


class NewFile:
    """A file that is written once, from start to end, hashed on the way and on the disk when ``close`` returns.

    Mode 0600: weights may be confidential. An existing file is never opened.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, 0
        self._hash = hashlib.sha256()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
        self._descriptor = os.open(path, flags, 0o600)

    def write(self, data: Data) -> None:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), BLOCK):
            block = view[start : start + BLOCK]
            write(self._descriptor, block)
            self._hash.update(block)
            self.size += len(block)

    def close(self) -> Record:
        """Force the contents to the disk and return what a manifest says about them."""
        sync(self._descriptor)
        self.abandon()
        return Record(self.path.name, self.size, self._hash.hexdigest())

    def abandon(self) -> None:
        """Close the descriptor without any promise; safe to call again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def write_file(path: Path, data: Data) -> Record:
    """Write a new small file durably."""
    file = NewFile(path)
    try:
        file.write(data)
        return file.close()
    finally:
        file.abandon()


def sync_directory(path: Path) -> None:
    """Make creations, renames and removals inside ``path`` durable."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def make_directories(path: Path) -> None:
    """Create ``path`` and its missing parents durably; an existing directory is fine."""
    if path.is_dir():
        return
    if path.parent != path:
        make_directories(path.parent)
    try:
        make_directory(path)
    except FileExistsError:
        if not path.is_dir():
            raise
    sync_directory(path.parent)


def remove(path: Path) -> None:
    """Remove a file or a whole tree. Symbolic links are removed, not followed; what is absent already is fine."""
    if not path.is_symlink() and path.is_dir():
        for entry in sorted(path.iterdir()):
            remove(entry)
        remove_directory(path)
    elif path.is_symlink() or path.exists():
        unlink(path)


def replace_file(path: Path, data: Data) -> None:
    """Give ``path`` new contents: old or new after a crash, never a mixture."""
    fresh = path.with_name(path.name + ".tmp")
    remove(fresh)
    write_file(fresh, data)
    rename(fresh, path)
    sync_directory(path.parent)


def sha256(path: Path) -> str:
    """SHA-256 of a file's contents in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def readable(count: int) -> str:
    """A number of bytes for people."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"


def free_bytes(path: Path) -> int | None:
    """Bytes that this user may still write where ``path`` is or will be; None when the system does not say."""
    for place in (path, *path.parents):
        try:
            return shutil.disk_usage(place).free
        except OSError:
            continue
    return None


def disk_error(path: Path, reason: str, needed: int | None) -> MachineError:
    """The error that says where writing failed, how many bytes were needed and how many are free."""
    free = free_bytes(path)
    sizes = [f"{readable(needed)} needed"] if needed is not None else []
    sizes += [f"{readable(free)} free"] if free is not None else []
    room = f" ({', '.join(sizes)})" if sizes else ""
    return MachineError(
        f"cannot write the checkpoint {path}: {reason}{room}. Older checkpoints are untouched. Fix: free space or"
        " lift the quota there, make it writable, or set run.root to another disk."
    )


@contextmanager
def writing(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn an OSError of the block into a MachineError with path, needed and free bytes."""
    try:
        yield
    except OSError as error:
        raise disk_error(path, error.strerror or str(error), needed) from error
