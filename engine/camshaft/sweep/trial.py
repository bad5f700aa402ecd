"""One run of a sweep: a process of ``camshaft train`` in a folder of its own, and what its metrics say."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from camshaft.errors import MachineError
from camshaft.rundir import RunDirectory
from camshaft.sweep.file import Metric
from camshaft.sweep.values import changes

_POLL_S = 0.3
_STOPPED = 130
Program = Callable[[Sequence[str]], list[str]]
"""The command line for the words behind ``train``."""
Worse = Callable[[int, float], bool]
"""Told a step and the metric there; says whether the trial is to be stopped."""


class Stop(Protocol):
    """Whether this process was asked to stop, and how often."""

    requests: int


class Outcome(NamedTuple):
    """How a trial ended. ``value`` is None where it is of no use, and ``reason`` then says why."""

    value: float | None
    reason: str = ""
    stopped: bool = False
    """This process was asked to stop: the trial is not over."""
    pruned: bool = False


def train(words: Sequence[str]) -> list[str]:
    """Our own program."""
    return [sys.executable, "-m", "camshaft", "train", *words]


class Trial:
    """``number`` of the sweep in ``folder``; ``recipe`` and ``overrides`` are those of all trials."""

    def __init__(self, folder: Path, number: int, recipe: Path, overrides: Sequence[str], metric: Metric) -> None:
        self.directory = RunDirectory(folder / f"trial_{number:04d}")
        self._log = folder / f"trial_{number:04d}.log"
        self._recipe, self._overrides, self._metric = recipe, overrides, metric

    def run(
        self,
        parameters: Mapping[str, Any],
        stop: Stop,
        worse: Worse | None = None,
        program: Program = train,
        waiting: Callable[[str], None] = lambda text: None,
    ) -> Outcome:
        """Run to the end, or go on where an earlier, killed process of this trial was.

        Raises:
            MachineError: the process cannot be started.
        """
        self._wait_for_earlier(stop, waiting)
        done = self.directory.read_status().get("state") == "finished"
        status, pruned = (0, False) if done or stop.requests else self._process(parameters, stop, worse, program)
        if stop.requests:
            return Outcome(None, "asked to stop", stopped=True)
        if pruned:
            return Outcome(self.value(), "stopped: worse than the median", pruned=True)
        if status:
            return Outcome(None, f"status {status}: {self._last_line()}")
        value = self.value()
        return Outcome(value, "" if value is not None else self._no_value())

    def values(self) -> Iterator[tuple[int, float]]:
        """(step, metric) of every record that has it. A line that is not complete yet is left out."""
        try:
            lines = self.directory.metrics.read_text(encoding="utf-8").splitlines()
        except OSError:
            return
        for line in lines:
            try:
                record = json.loads(line)
                yield int(record["progress/global_step"]), float(record[self._metric.name])
            except (ValueError, TypeError, KeyError):
                continue

    def value(self) -> float | None:
        """What the trial counts with; None where there is nothing, or something that is no number."""
        found = [value for _, value in self.values()]
        if not found or not all(math.isfinite(value) for value in found):
            return None
        return {"last": found[-1], "min": min(found), "max": max(found)}[self._metric.of]

    def _no_value(self) -> str:
        if list(self.values()):
            return f"{self._metric.name} became NaN or infinite"
        return f"{self.directory.metrics} has no {self._metric.name}"

    def _process(
        self, parameters: Mapping[str, Any], stop: Stop, worse: Worse | None, program: Program
    ) -> tuple[int, bool]:
        words = [str(self._recipe), *self._overrides, *changes(parameters), f"run.dir={self.directory.path}"]
        with self._log.open("ab") as log:
            try:
                process = subprocess.Popen(
                    program(words), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
            except OSError as error:
                raise MachineError(f"a trial cannot be started: {error}") from error
        return self._watch(process, stop, worse)

    def _watch(self, process: subprocess.Popen[bytes], stop: Stop, worse: Worse | None) -> tuple[int, bool]:
        """Its exit status, and whether it was stopped for being worse."""
        seen, asked, pruned = 0, 0, False
        try:
            while process.poll() is None:
                if stop.requests > asked:
                    asked = stop.requests
                    process.kill() if asked > 1 else process.terminate()
                if worse is not None and not (asked or pruned):
                    fresh = list(self.values())[seen:]
                    seen += len(fresh)
                    pruned = any(worse(step, value) for step, value in fresh)
                    if pruned:
                        process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_S)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        status = process.returncode
        return status, pruned and status in (0, _STOPPED, -signal.SIGTERM)  # the last: before it could answer

    def _wait_for_earlier(self, stop: Stop, waiting: Callable[[str], None]) -> None:
        """A process of this trial that outlived an earlier, killed sweep comes to its end first."""
        self.directory.create()
        told = False
        while not stop.requests:
            try:
                self.directory.lock().release()
            except MachineError as error:
                if not told:
                    told = True
                    waiting(f"waiting: {error}")
                time.sleep(_POLL_S)
            else:
                return

    def _last_line(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        told = [line for line in lines if line.startswith("error:")]
        return (told or lines or ["nothing was printed"])[-1][:300]
