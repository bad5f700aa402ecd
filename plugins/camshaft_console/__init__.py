"""Shows a run to the person who started it: one live line on a terminal, plain ``name=value`` lines elsewhere.

At the end the loss curve is drawn, over earlier segments of a resumed run too where ``metrics.jsonl`` has them.
Only rank 0 writes, to standard output. Claims nothing.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

import camshaft
from camshaft import Plan, hookimpl
from camshaft_console.curve import draw
from camshaft_console.line import words
from camshaft_console.progress import Progress

if TYPE_CHECKING:
    from camshaft.state import State
    from camshaft_console.display import Display

_STEP = "progress/global_step"
_CURVES = ("train/loss", "eval/loss")
_logger = logging.getLogger("camshaft.console")


class Options(camshaft.Options):
    """``plugins.console`` of a recipe."""

    style: Literal["auto", "plain", "rich"] = "auto"
    """`rich`: one line updated in place; `plain`: one line a record; `auto`: `rich` on a terminal, else `plain`."""
    curve: bool = True
    """Draw the loss curve when the run ends."""


class Plugin(camshaft.Plugin):
    """A broken output stream ends the display, not the run."""

    Options = Options
    draws = False

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self._display: Display | None = None
        self._points: dict[str, dict[int, float]] = {name: {} for name in _CURVES}
        self._progress = Progress(0)
        self._first_step = 0

    @hookimpl
    def plan(self) -> Plan:
        return Plan()

    @hookimpl
    def pre_run(self, state: State) -> None:
        if not state.world.is_main:
            return
        from camshaft_console.display import open_display

        self._progress = Progress(state.world.total_steps)
        self._progress.add(state.step)
        self._first_step = state.step
        try:
            self._display = open_display(self.options.style, sys.stdout)
        except (OSError, ValueError) as error:
            self._give_up(error)

    @hookimpl
    def log(self, state: State, record: Mapping[str, float | int]) -> None:
        if self._display is None:
            return
        for name in _CURVES:
            if name in record:
                self._points[name][int(record[_STEP])] = float(record[name])
        display, step, total = self._display, int(record[_STEP]), state.world.total_steps
        if "train/loss" in record:
            self._progress.add(step)
            shown = words(record, total, self._progress.eta_s())
            self._guarded(lambda: display.progress(shown, step / total))
        else:
            self._guarded(lambda: display.permanent(" ".join(words(record, total))))

    @hookimpl
    def close(self, state: State, status: str) -> None:
        display, self._display = self._display, None
        if display is None:
            return
        closed = self._guarded(display.close)
        if closed and self.options.curve and status != "failed":
            self._guarded(lambda: self._draw(display, Path(state.world.run.metrics), sys.stdout))

    def _draw(self, display: Display, metrics: Path, stream: TextIO) -> None:
        points = {name: dict(found) for name, found in self._points.items()}
        for name, step, value in _earlier(metrics):
            if step <= self._first_step:
                points[name].setdefault(step, value)
        train, evaluation = (sorted(points[name].items()) for name in _CURVES)
        width = max(20, min(72, shutil.get_terminal_size().columns - 14))
        lines = draw(train, evaluation, width=width, ascii_only=not _can_encode("⣿●┤", stream))
        if lines:
            display.permanent("\n".join(["", *lines]))

    def _guarded(self, write: Callable[[], None]) -> bool:
        try:
            write()
        except (OSError, ValueError) as error:  # a closed pipe, a full disk; ValueError: the file is closed
            self._give_up(error)
            return False
        return True

    def _give_up(self, error: Exception) -> None:
        self._display = None
        _logger.warning("the console plugin is off, standard output cannot be written: %s", error)


def _earlier(metrics: Path) -> Iterator[tuple[str, int, float]]:
    """(metric, step, value) of the curves in a metrics file; nothing when there is none, torn lines are skipped."""
    if not metrics.is_file():
        return
    with metrics.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
                found = [(name, int(record[_STEP]), float(record[name])) for name in _CURVES if name in record]
            except (ValueError, TypeError, KeyError):
                continue
            yield from (point for point in found if math.isfinite(point[2]))


def _can_encode(text: str, stream: TextIO) -> bool:
    try:
        text.encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
