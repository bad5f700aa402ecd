"""Checkpoints that are never torn, load without executing anything, and continue bit for bit on any number of ranks.

Each rank writes the pieces that torch.distributed.checkpoint's planner gives it into one safetensors file.
``index.json`` says where each tensor lies, and ``manifest.json`` holds size and SHA-256 of every file. A checkpoint is
written to ``step_N.tmp``, forced to the disk, and renamed; so a folder called ``step_N`` was complete once. Before
anything is loaded every byte is compared with the manifest; a damaged checkpoint is named, and the one before is used.

Invariant: at any instant, killed anywhere, the newest intact checkpoint is the last one finished or the one before.
What is in it does not depend on the layout: names, shapes and numbers are those of whole parameters, in the master
dtype, in boxes that any other layout on any number of ranks reads what it holds from, and no more; whether data ranks,
tensor parallel or a pipeline divided them. What several ranks hold alike is written once.
Disk: ``keep_last + 1`` checkpoints at the peak. Memory: one tensor or box on the way from a GPU, or into one; with
``async`` a copy on the CPU of what this rank writes, kept from save to save (pinned where there is a GPU). Traffic: the
plan's metadata only, on a gloo group of its own.

Claims nothing. Owns the slots ``save`` and ``load``. This module imports no torch.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import camshaft
from camshaft.claims import Plan, PlanContext
from camshaft.errors import MachineError
from camshaft.plugin import hookimpl
from camshaft.recipe.length import known_steps
from camshaft_checkpoint.inspection import inspect, verify
from camshaft_checkpoint.options import CheckpointOptions, problems

if TYPE_CHECKING:
    from camshaft.state import State
    from camshaft_checkpoint.saving import Saver

__all__ = ["Plugin", "inspect", "verify"]

_log = logging.getLogger(__name__)
_FAILED_WAIT_S = 5.0
"""How long a failing run waits for a checkpoint in the background: a peer that it talks to may be gone."""


class Plugin(camshaft.Plugin):
    """Saves every N steps and at the end, and continues from the newest intact checkpoint."""

    Options = CheckpointOptions
    draws = False

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self._saver: Saver | None = None

    @hookimpl
    def plan(self, context: PlanContext) -> Plan:
        """Refuse options that would never save, or that contradict each other."""
        return Plan(problems=tuple(problems(self.options, known_steps(context.recipe), f"plugins.{self.name}")))

    @hookimpl
    def bind(self, state: State) -> None:
        """Create the group that ranks agree on checkpoints over; all ranks come here."""
        from camshaft_checkpoint.ranks import Ranks
        from camshaft_checkpoint.saving import Saver

        ranks = Ranks(state.world.recipe.launch.group_timeout_s)
        root = Path(state.world.run.checkpoints)
        self._saver = Saver(root, ranks, self.options.keep_last, self.options.keep_every)

    @hookimpl
    def load(self, state: State) -> bool:
        """Continue from the newest intact checkpoint, if there is one.

        Raises:
            CheckpointError: checkpoints exist and none is intact, or the intact one does not fit the model.
            MachineError: the folder of checkpoints cannot be written to.
        """
        from camshaft_checkpoint.resuming import resume

        return resume(state, self._bound(), self.options.resume)

    @hookimpl
    def post_step(self, state: State) -> None:
        """Save when it is time to; report a save that has failed in the background."""
        every = self.options.every_steps
        due = every is not None and state.step % every == 0
        try:
            self._bound().poll()
            if due:
                self._bound().save(state, background=self.options.async_save)
        except MachineError as error:
            if self.options.on_error == "stop":
                raise
            _log.error("step %d: %s. Training goes on (on_error: continue).", state.step, error)

    @hookimpl
    def save(self, state: State) -> None:
        """Write this step's checkpoint, on the disk when this returns. Nothing to do when it is there already."""
        saver = self._bound()
        if not self.options.save_at_end and _at_end(state):
            saver.wait()
            return
        saver.save(state, background=False)

    @hookimpl
    def close(self, state: State, status: str) -> None:
        """Wait for what is being written; its error is raised, except when the run failed with another one."""
        if self._saver is None:
            return
        try:
            self._saver.wait(_FAILED_WAIT_S if status == "failed" else None)
        except MachineError as error:
            if status != "failed" and self.options.on_error == "stop":
                raise
            _log.error("the last checkpoint was not written: %s", error)

    def _bound(self) -> Saver:
        assert self._saver is not None, "bind comes before every other call"
        return self._saver


def _at_end(state: State) -> bool:
    """Whether training has reached its last step, or the end of the data, rather than being stopped."""
    return state.step >= state.world.total_steps or state.window is None
