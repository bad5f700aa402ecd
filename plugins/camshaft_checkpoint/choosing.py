"""Which checkpoint to continue from: the newest that every rank finds intact. Older ones only with a loud warning."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from camshaft.errors import CheckpointError
from camshaft_checkpoint import folders, index, manifest
from camshaft_checkpoint.files import Record
from camshaft_checkpoint.index import Index
from camshaft_checkpoint.manifest import Manifest
from camshaft_checkpoint.ranks import Ranks

_log = logging.getLogger(__name__)
_LISTED = 6


@dataclass(frozen=True, slots=True)
class Choice:
    """A checkpoint in which every byte was read and found as written."""

    folder: Path
    manifest: Manifest
    index: Index


def candidates(root: Path, resume: str) -> list[Path]:
    """Checkpoints to try, in that order: this run's own, newest first, then those that ``resume`` points to.

    The run's own come first also where ``resume`` is a path: a run that was killed and is started again by the same
    command goes on where it was.

    Raises:
        CheckpointError: the path holds no checkpoint, or ``resume`` is ``never`` and the run has checkpoints.
    """
    own = folders.complete(root)
    if resume == "auto":
        return own
    if resume == "never":
        if own:
            raise CheckpointError(
                f"{root} holds {own[0].name}, and resume is 'never': a new run there would mix two runs. Fix: choose"
                " another run.dir, remove the folder, or set plugins.checkpoint.resume=auto"
            )
        return []
    return own + [folder for folder in given(Path(resume)) if folder not in own]


def given(path: Path) -> list[Path]:
    """Checkpoints that a path names: itself, those inside, or those of the run directory that it is; newest first.

    Raises:
        CheckpointError: there is none.
    """
    if (path / manifest.NAME).is_file() or manifest.folder_step(path) is not None:
        if path.is_dir():
            return [path]
    elif found := folders.complete(path) or folders.complete(path / "checkpoints"):
        return found
    raise CheckpointError(
        f"there is no checkpoint at {path}. Fix: give a step_N folder, a folder of them or a run directory, or remove"
        " plugins.checkpoint.resume"
    )


def choose(ranks: Ranks, folders_to_try: list[Path]) -> tuple[Choice | None, list[Path]]:
    """The first intact checkpoint, and the damaged ones before it. Collective; the work is divided over the ranks.

    Raises:
        CheckpointError: there are checkpoints and none is intact; names every one with what is wrong.
    """
    damaged: dict[Path, list[str]] = {}
    for folder in folders_to_try:
        choice, faults = _examine(ranks, folder)
        if choice is not None:
            return choice, list(damaged)
        damaged[folder] = faults
        if ranks.is_main:
            _log.warning("CHECKPOINT DAMAGED, trying the one before: %s", listed(faults))
    if damaged:
        raise CheckpointError(
            "no checkpoint is intact, and nothing was loaded:\n"
            + "\n".join(f"  {folder.name}: {listed(faults)}" for folder, faults in damaged.items())
            + "\nFix: restore one of them, or start a new run with another run.dir"
        )
    return None, []


def listed(faults: list[str]) -> str:
    """Faults as one text, a long list cut short."""
    more = f"; and {len(faults) - _LISTED} more" if len(faults) > _LISTED else ""
    return "; ".join(faults[:_LISTED]) + more


def _examine(ranks: Ranks, folder: Path) -> tuple[Choice | None, list[str]]:
    """Each rank reads manifest and index, and its share of the other files."""
    choice, faults = _open(folder)
    if choice is not None:
        faults = manifest.check_files(folder, _share(choice.manifest, ranks), choice.index)
    everyone = [fault for faults_of_rank in ranks.share(faults) for fault in faults_of_rank]
    return (None if everyone else choice), list(dict.fromkeys(everyone))


def _open(folder: Path) -> tuple[Choice | None, list[str]]:
    try:
        found = manifest.read(folder)
        return Choice(folder, found, manifest.read_index(folder, found)), []
    except CheckpointError as error:
        return None, [str(error)]


def _share(found: Manifest, ranks: Ranks) -> list[Record]:
    """This rank's part of the tensor files, large and small ones spread evenly."""
    by_size = sorted(found.files, key=lambda record: (-record.size, record.name))
    return [record for record in by_size if record.name != index.NAME][ranks.rank :: ranks.size]
