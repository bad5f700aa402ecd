"""Saving: agree that and where, plan, copy if asynchronous, write, commit, rotate. A failure is every rank's."""

from __future__ import annotations

import itertools
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult

from camshaft_checkpoint import contents, files, folders, held, manifest, merging, storage
from camshaft_checkpoint.background import Background
from camshaft_checkpoint.contents import Description
from camshaft_checkpoint.held import Held
from camshaft_checkpoint.manifest import Manifest
from camshaft_checkpoint.planning import Saving
from camshaft_checkpoint.ranks import Ranks

if TYPE_CHECKING:
    from camshaft.mesh import MeshShape
    from camshaft.state import State

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Job:
    """A checkpoint that is planned and not written yet."""

    step: int
    folder: Path
    saving: Saving
    document: Description | None
    """On rank 0."""
    started: float


class Saver:
    """Writes the checkpoints of one run. Every method but ``poll`` is collective over all ranks."""

    def __init__(self, root: Path, ranks: Ranks, keep_last: int, keep_every: int | None) -> None:
        self.root, self.ranks = root, ranks
        self.keep_last, self.keep_every = keep_last, keep_every
        self.bad: set[str] = set()
        """Names of checkpoints of this run that were found damaged."""
        self.saved_step: int | None = None
        """Step of the newest checkpoint that is known to be on the disk."""
        self._background = Background()
        self._buffers: dict[MetadataIndex, Tensor] = {}

    def save(self, state: State, *, background: bool) -> None:
        """Save this step, unless it is saved already or the numbers are not finite.

        With ``background`` everything that later steps could change is copied before this returns, and the writing
        goes on in a thread; otherwise the checkpoint is on the disk when this returns.

        Raises:
            MachineError: it, or the one that was still being written, could not be written; equal on all ranks.
            CheckpointError: something in it cannot be stored.
        """
        self.wait()
        if self.saved_step == state.step:
            return
        job = self._prepare(state)
        if job is None:
            return
        if background:
            job.saving.planner.snapshot(self._buffers)
            self._background.start(lambda: self._write(job))
        else:
            self._write(job)

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until nothing is being written, and raise what went wrong with it."""
        self._background.wait(timeout_s)

    def poll(self) -> None:
        """Raise the error of a save that has failed in the background; do not wait."""
        if self._background.finished:
            self._background.wait(None)

    def _prepare(self, state: State) -> Job | None:
        started = time.monotonic()
        if not all(self.ranks.share(_finite(state))):
            if self.ranks.is_main:
                _log.warning(
                    "step %d: loss or gradient norm is not finite; no checkpoint is written, so that the last good"
                    " one stays the newest",
                    state.step,
                )
            return None
        apart = self.ranks.union(held.apart(state))
        tensors, description = self.ranks.everywhere(lambda: contents.collect(state, apart))
        folder = self.ranks.on_main(lambda: self._begin(state.step))
        if folder is None:
            self.saved_step = state.step
            return None
        try:
            saving = self._saving(folder, tensors, state.world.mesh.shape)
            return self._plan(Job(state.step, folder, saving, None, started), description, state.world.mesh.shape)
        except Exception:
            self._abandon(folder)
            raise

    def _begin(self, step: int) -> Path | None:
        """The folder to write into, or None when this step has a good checkpoint already."""
        final = self.root / manifest.folder_name(step)
        with files.writing(final):
            if final.is_dir():
                faults = manifest.verify(final)
                if not faults:
                    _log.info("checkpoint %s exists and is intact; it is kept as it is", final.name)
                    return None
                _log.warning("checkpoint %s is damaged and will be replaced: %s", final.name, faults[0])
            return folders.begin(self.root, step)

    def _saving(self, folder: Path, tensors: dict[str, Held], shape: MeshShape) -> Saving:
        writer = storage.Writer(folder, self.ranks.rank)
        return Saving(tensors, writer, self.ranks, lambda rank: shape.coordinates(rank)["tp"])

    def _plan(self, job: Job, description: Description, shape: MeshShape) -> Job:
        job.saving.plan()
        descriptions = self.ranks.collect(description)
        job.saving.total = self.ranks.on_main(lambda: self._check_space(job))
        places = [shape.coordinates(rank)["pp"] for rank in range(self.ranks.size)]
        document = self.ranks.on_main_keep(lambda: merging.merge(descriptions or [], places))
        return Job(job.step, job.folder, job.saving, document, job.started)

    def _check_space(self, job: Job) -> int:
        free = files.free_bytes(job.folder)
        if free is not None and free < job.saving.total:
            raise files.disk_error(job.folder, "not enough space", job.saving.total)
        return job.saving.total

    def _write(self, job: Job) -> None:
        try:
            results = self.ranks.collect(self.ranks.everywhere(lambda: self._write_own(job)))
            self.ranks.on_main(lambda: self._commit(job, list(itertools.chain(*(results or [])))))
        except Exception:
            self._abandon(job.folder)
            raise
        self.saved_step = job.step

    def _write_own(self, job: Job) -> list[WriteResult]:
        with files.writing(job.folder, job.saving.total):
            return job.saving.write()

    def _commit(self, job: Job, results: list[WriteResult]) -> None:
        assert job.saving.metadata is not None and job.document is not None  # rank 0 has both
        index = storage.index_of(job.saving.metadata, results, job.document)
        written = Manifest(job.step, self.ranks.size, storage.records_of(results))
        with files.writing(job.folder, job.saving.total):
            final = folders.finish(job.folder, index, written)
        self.bad.discard(final.name)
        _log.info("checkpoint %s: %s in %.2f s", final, files.readable(written.size), time.monotonic() - job.started)
        folders.rotate(self.root, final, self.keep_last, self.keep_every, self.bad)

    def _abandon(self, folder: Path) -> None:
        if self.ranks.is_main:
            try:
                files.remove(folder)
            except OSError as error:
                _log.warning("cannot remove the unfinished checkpoint %s: %s", folder, error)


def _finite(state: State) -> bool:
    return all(value is None or math.isfinite(float(_whole(value))) for value in (state.loss, state.grad_norm))


def _whole(value: Tensor) -> Tensor:
    full = getattr(value, "full_tensor", None)
    whole: Tensor = value if full is None else full()
    return whole
