"""The folder of a run's checkpoints: which there are, committing a new one, and which old ones may go. No torch.

A checkpoint is written as ``step_N.tmp`` and renamed when everything in it is on the disk. What is removed is renamed
to ``trash-...`` first, so that a run that is killed while it removes leaves nothing that looks like a checkpoint.
``latest`` names the newest for people; it is never read here.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

from camshaft_checkpoint import files, index, manifest
from camshaft_checkpoint.index import Index
from camshaft_checkpoint.manifest import Manifest

LATEST = "latest"
_TRASH = "trash-"
_TEMPORARY = ".tmp"
_log = logging.getLogger(__name__)


def complete(root: Path) -> list[Path]:
    """Folders named like finished checkpoints, the highest step first. Whether they are intact is not looked at."""
    if not root.is_dir():
        return []
    found = [(manifest.folder_step(path), path) for path in root.iterdir() if path.is_dir()]
    return [path for _, path in sorted(((step, path) for step, path in found if step is not None), reverse=True)]


def sweep(root: Path) -> None:
    """Remove what killed runs left: unfinished checkpoints, and checkpoints whose removal had begun.

    What cannot be removed is logged: it is in nobody's way.
    """
    if not root.is_dir():
        return
    for path in sorted(root.iterdir()):
        stale = path.name.startswith("step_") and path.name.endswith(_TEMPORARY)
        if stale or path.name.startswith(_TRASH) or path.name == LATEST + _TEMPORARY:
            try:
                files.remove(path)
            except OSError as error:
                _log.warning("cannot remove %s, which an earlier run left: %s", path, error)


def begin(root: Path, step: int) -> Path:
    """Make the empty folder that a checkpoint is written into, and remove leftovers."""
    files.make_directories(root)
    sweep(root)
    folder = root / (manifest.folder_name(step) + _TEMPORARY)
    files.make_directory(folder)
    files.sync_directory(root)
    return folder


def finish(folder: Path, contents: Index, written: Manifest) -> Path:
    """Turn a fully written temporary folder into a checkpoint, and return where it is.

    Raises:
        OSError: nothing was committed, or a file that a rank wrote is not there in full.
    """
    for record in written.files:
        faults = manifest.size_faults(folder, record)
        if faults:
            raise OSError(f"{faults[0]} (do all ranks see the same file system?)")
    table = files.write_file(folder / index.NAME, contents.encode())
    full = Manifest(written.step, written.world_size, (*written.files, table))
    files.write_file(folder / manifest.NAME, full.encode())
    files.sync_directory(folder)
    final = folder.with_name(manifest.folder_name(written.step))
    if final.exists():  # a damaged one: a good one would have been kept
        discard(final, delete=False)
    files.rename(folder, final)
    files.sync_directory(final.parent)
    return final


def discard(folder: Path, delete: bool = True) -> None:
    """Take a checkpoint out of use at once, then delete it."""
    trash = folder.with_name(_TRASH + folder.name)
    files.remove(trash)
    files.rename(folder, trash)
    if delete:
        files.remove(trash)


def rotate(root: Path, newest: Path, keep_last: int, keep_every: int | None, bad: Collection[str]) -> None:
    """Point ``latest`` to ``newest`` and discard what is older than the last ``keep_last`` good checkpoints.

    Only a checkpoint whose manifest and file sizes are right, and that was not found damaged (``bad``), counts as
    good; so damaged ones never push out the last good one. Faults are logged: the new checkpoint is safe already.
    """
    try:
        files.replace_file(root / LATEST, f"{newest.name}\n".encode())
        for folder in surplus(root, keep_last, keep_every, bad):
            discard(folder)
        sweep(root)
    except OSError as error:
        _log.warning("checkpoint %s is complete, but cleaning up in %s failed: %s", newest.name, root, error)


def surplus(root: Path, keep_last: int, keep_every: int | None, bad: Collection[str]) -> list[Path]:
    """Checkpoints that retention does not keep, oldest first."""
    good, remove = 0, []
    for folder in complete(root):
        step = manifest.folder_step(folder)
        if good >= keep_last and not (keep_every and step is not None and step % keep_every == 0):
            remove.append(folder)
        elif folder.name not in bad and not manifest.glance(folder):
            good += 1
    return remove[::-1]
