"""Folders of built data that are found by the hash of what they were built from.

An entry is built in a folder of its own and renamed, so nobody ever sees a part of one. The builder holds
``flock`` on a file beside it: the kernel releases that lock when its holder dies, so no lock can be stale.
The next builder removes what a killed one left.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from camshaft.data.corpus import file_digest
from camshaft.errors import MachineError

MANIFEST = "manifest.json"
_HASHED_ON_USE = (".idx", ".json")


def folder(setting: str | None, environ: Mapping[str, str]) -> Path:
    """The cache folder: the recipe's ``data.cache_dir``, else ``camshaft`` in the user's cache folder.

    Raises:
        MachineError: neither is set and the user has no home folder (a container with a user id of no account).
    """
    if setting:
        return Path(setting)
    base = environ.get("XDG_CACHE_HOME", "")
    if Path(base).is_absolute():
        return Path(base) / "camshaft"
    try:
        return Path.home() / ".cache" / "camshaft"
    except RuntimeError as error:
        raise MachineError("the user has no home folder to keep a cache in. Set data.cache_dir.") from error


def fetch(root: Path, key: str, build: Callable[[Path], None]) -> Path:
    """The folder of entry ``key``; ``build`` fills it if there is none, or if the one there is damaged.

    Safe with any number of processes: one builds, the others wait for it.

    Raises:
        MachineError: the cache folder cannot be written, or has no locks.
    """
    entry = root / key
    if intact(entry):
        return entry
    with _locked(root, key):
        if intact(entry):
            return entry
        for left in root.glob(f".{key}.*"):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
        try:
            _build(root, key, build)
        except OSError as error:
            raise _unusable(root, error) from error
    return entry


def intact(entry: Path) -> bool:
    """Whether an entry is complete: sizes of all files, and the content of all but the token file."""
    try:
        manifest = json.loads((entry / MANIFEST).read_text())
        return bool(manifest) and all(
            (entry / name).stat().st_size == record["size"]
            and (not name.endswith(_HASHED_ON_USE) or file_digest(entry / name).hex() == record["sha256"])
            for name, record in manifest.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def content_key(entry: Path) -> str:
    """sha256 over the contents of an entry, from its manifest."""
    return hashlib.sha256((entry / MANIFEST).read_bytes()).hexdigest()


def _build(root: Path, key: str, build: Callable[[Path], None]) -> None:
    work = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=root))
    try:
        build(work)
        manifest = {
            path.name: {"size": path.stat().st_size, "sha256": file_digest(path).hex()}
            for path in sorted(work.iterdir())
        }
        with (work / MANIFEST).open("w") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        work.chmod(0o755)
        entry = root / key
        if entry.exists():
            # A damaged entry: whoever has it open keeps its files until they are closed.
            entry.rename(work / "damaged")
        work.rename(entry)
        shutil.rmtree(entry / "damaged", ignore_errors=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _locked(root: Path, key: str) -> Iterator[None]:
    try:
        root.mkdir(parents=True, exist_ok=True)
        handle = os.open(root / f".{key}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise _unusable(root, error) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            raise _unusable(root, error) from error
        yield
    finally:
        os.close(handle)


def _unusable(root: Path, error: OSError) -> MachineError:
    return MachineError(
        f"the cache folder {root} cannot be used: {error.strerror or error}. "
        "Set data.cache_dir to a folder that can be written and has room."
    )


class Digests:
    """sha256 of files, remembered in the cache by path, size and times, so that big text is hashed once.

    Args:
        root: the cache folder; nothing is kept when it cannot be written.
    """

    def __init__(self, root: Path) -> None:
        self._root = root / "digests"

    def __call__(self, path: Path) -> bytes:
        """The file's sha256. Raises RecipeError if it cannot be read."""
        try:
            state = path.stat()
        except OSError:
            return file_digest(path)
        now = [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]
        note = self._root / hashlib.sha256(str(path.resolve()).encode()).hexdigest()
        try:
            known = json.loads(note.read_text())
            if known["state"] == now:
                return bytes.fromhex(known["sha256"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        digest = file_digest(path)
        self._keep(note, json.dumps({"state": now, "sha256": digest.hex()}))
        return digest

    def _keep(self, note: Path, text: str) -> None:
        try:
            note.parent.mkdir(parents=True, exist_ok=True)
            work = note.with_name(f"{note.name}.{os.getpid()}")
            work.write_text(text)
            work.replace(note)
        except OSError:
            return
