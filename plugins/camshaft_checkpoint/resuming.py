"""Continuing a run: look for checkpoints, choose one together, restore it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from camshaft_checkpoint import choosing, files, folders, loading
from camshaft_checkpoint.saving import Saver

if TYPE_CHECKING:
    from camshaft.state import State

_log = logging.getLogger(__name__)


def resume(state: State, saver: Saver, option: str) -> bool:
    """Restore the newest intact checkpoint that ``option`` allows; False, and nothing changed, if there is none.

    Raises:
        CheckpointError: there are checkpoints and none can be used.
        MachineError: the folder cannot be written to, so that the run could never save.
    """
    ranks = saver.ranks
    ranks.on_main(lambda: _clean(saver.root))
    to_try = ranks.on_main(lambda: choosing.candidates(saver.root, option))
    choice, damaged = choosing.choose(ranks, to_try)
    saver.bad.update(folder.name for folder in damaged if folder.parent == saver.root)
    if choice is None:
        return False
    loading.restore(state, ranks, choice)
    if choice.folder.parent == saver.root:
        saver.saved_step = state.step
    if ranks.is_main:
        _log.info("continuing from %s, after %d steps", choice.folder, state.step)
    return True


def _clean(root: Path) -> None:
    """Remove leftovers of a killed run, and find out now, not at the first save, whether one can write here."""
    probe = root / "step_probe.tmp"
    with files.writing(root):
        files.make_directories(root)
        folders.sweep(root)
        files.write_file(probe, b"camshaft")
        files.remove(probe)
