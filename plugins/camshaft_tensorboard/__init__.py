"""Writes metrics as TensorBoard scalars under ``<run directory>/tensorboard``.

Needs the package ``tensorboard`` (``pip install 'camshaft[tensorboard]'``). Without it, or when its files cannot be
written, the run says so once and trains on: no tracker stops training. On a resume TensorBoard is told to hide what
an earlier, killed run wrote after the restored step. Claims nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

import camshaft
from camshaft import Plan, hookimpl

if TYPE_CHECKING:
    from camshaft.state import State

_STEP = "progress/global_step"
_logger = logging.getLogger("camshaft.tensorboard")


class Options(camshaft.Options):
    """``plugins.tensorboard`` of a recipe."""

    dir: str | None = None
    """Folder of the event files; default: `tensorboard` in the run directory. Relative paths start there too."""
    flush_s: Annotated[float, Field(gt=0)] = 10.0
    """Seconds between two writes of pending events."""


class Plugin(camshaft.Plugin):
    """Adds one scalar a metric on rank 0."""

    Options = Options
    draws = False

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self._writer: Any = None
        self._failures = 0

    @hookimpl
    def plan(self) -> Plan:
        return Plan()

    @hookimpl
    def pre_run(self, state: State) -> None:
        if not state.world.is_main:
            return
        try:
            self._writer = self._open(state)
        except ImportError as error:
            _logger.warning(
                "TensorBoard is off: %s. Fix: pip install 'camshaft[tensorboard]', or remove plugins.tensorboard",
                error,
            )
        except Exception as error:  # a tracker never stops training
            _logger.warning("TensorBoard is off: %s: %s", type(error).__name__, error)

    def _open(self, state: State) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(
            log_dir=str(Path(state.world.run.path) / (self.options.dir or "tensorboard")),
            purge_step=state.step + 1 if state.step else 0,
            flush_secs=self.options.flush_s,
        )

    @hookimpl
    def log(self, state: State, record: Mapping[str, float | int]) -> None:
        if self._writer is None:
            return
        try:
            step = int(record[_STEP])
            for name, value in record.items():
                if name != _STEP:
                    self._writer.add_scalar(name, value, step)
        except Exception as error:  # a tracker never stops training
            self._failed(error)

    @hookimpl
    def close(self, state: State, status: str) -> None:
        writer, self._writer = self._writer, None
        try:
            if writer is not None:
                writer.close()
        except Exception as error:  # a tracker never stops training
            self._failed(error)
        if self._failures > 1:
            _logger.warning("TensorBoard failed %d times", self._failures)

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        if self._failures == 1:
            _logger.warning("TensorBoard lost a record: %s: %s", type(error).__name__, error)
