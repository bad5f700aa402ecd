"""Writes every metrics record as one line of ``metrics.jsonl`` in the run directory: the record of truth.

A line is a JSON object whose keys are the metric names (``train/loss``, ``progress/global_step``) and ``time``,
the seconds since 1970. Numbers keep every digit: what is read back equals what was measured. JSON has no NaN, so
values that are not finite are the strings ``"nan"``, ``"inf"`` and ``"-inf"``, which ``float()`` reads.

Invariant: after a resume the file holds each step once. Lines later than the restored step belong to work that the
run repeats; they move to ``metrics.cut.jsonl`` before the first new line is written. Claims nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

import camshaft
from camshaft import Plan, hookimpl
from camshaft_jsonl.writer import Writer, cut

if TYPE_CHECKING:
    from camshaft.state import State

_logger = logging.getLogger("camshaft.jsonl")


class Options(camshaft.Options):
    """``plugins.jsonl`` of a recipe."""

    fsync_every_s: Annotated[float, Field(ge=0)] = 30.0
    """Seconds between two forced writes to the disk. A killed process loses nothing; a lost machine at most this."""


class Plugin(camshaft.Plugin):
    """Appends records on rank 0. A disk that refuses a line costs that line and one warning, never the run."""

    Options = Options
    draws = False

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self._writer: Writer | None = None
        self._failures = 0

    @hookimpl
    def plan(self) -> Plan:
        return Plan()

    @hookimpl
    def pre_run(self, state: State) -> None:
        if not state.world.is_main:
            return
        path = state.world.run.metrics
        try:
            note = cut(path, state.step)
            self._writer = Writer(path, fsync_every_s=self.options.fsync_every_s)
        except OSError as error:
            _logger.warning("%s cannot be written (%s): this run keeps no metrics file", path, error)
            return
        if note:
            _logger.warning("%s: %s", path, note)

    @hookimpl
    def log(self, state: State, record: Mapping[str, float | int]) -> None:
        if self._writer is None:
            return
        try:
            self._writer.write({**record, "time": time.time()})
        except (OSError, TypeError, ValueError) as error:  # a full disk, a value that is no number
            self._failures += 1
            if self._failures == 1:
                _logger.warning("writing to %s failed: %s", self._writer.path, error)

    @hookimpl
    def close(self, state: State, status: str) -> None:
        writer, self._writer = self._writer, None
        if writer is None:
            return
        try:
            writer.close()
        except OSError as error:
            _logger.warning("%s may be incomplete: %s", writer.path, error)
        if self._failures > 1:
            _logger.warning("writing to %s failed %d times", writer.path, self._failures)
