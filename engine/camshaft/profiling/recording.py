"""One rank's part of ``camshaft profile``: windows that warm up, windows that are recorded, one trace."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from camshaft.errors import Interrupted, RecipeError
from camshaft.profiling import ranges
from camshaft.profiling.held import gradients, held
from camshaft.profiling.memory import Held
from camshaft.profiling.trace import PHASE, WINDOW

if TYPE_CHECKING:
    from camshaft.loop import Heartbeat, StopSignal, Trainer


@dataclass(frozen=True, slots=True)
class Settings:
    """How many windows (optimizer steps) are run before the profiler is on, and how many are recorded."""

    warmup: int = 3
    steps: int = 1

    @property
    def windows(self) -> int:
        """All that are run: one more than these two, in which the profiler itself warms up."""
        return self.warmup + 1 + self.steps


@dataclass(slots=True)
class Recording:
    """What a rank has when its windows are over, beside the trace in ``path``."""

    path: Path
    held: list[Held] = field(default_factory=list)
    gradients: list[dict[int, str]] = field(default_factory=list)
    plain_s: list[float] = field(default_factory=list)
    """Seconds of each window that warmed up, without the profiler."""
    recorded_s: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    """Of each recorded window, over all ranks."""


class Recorder:
    """Runs windows of a trainer that is open. Nothing is evaluated, logged or saved."""

    def __init__(self, trainer: Trainer, heartbeat: Heartbeat, stop: StopSignal) -> None:
        self._trainer, self._heartbeat, self._stop = trainer, heartbeat, stop
        self._cuda = trainer.state.world.device.type == "cuda"

    def run(self, settings: Settings, path: Path) -> Recording:
        """Run all windows and write the trace to ``path``.

        Raises:
            RecipeError: the data end before the last window.
            Interrupted: asked to stop.
        """
        found = Recording(path)
        modules = ranges.Modules(self._trainer.state.model)
        try:
            for _ in range(settings.warmup):
                found.plain_s.append(self._window(settings))
            self._record(settings, found, modules)
        finally:
            modules.remove()
        return found

    def _record(self, settings: Settings, found: Recording, modules: ranges.Modules) -> None:
        state = self._trainer.state

        def before(phase: str) -> None:
            if phase == "clip":
                found.gradients.append(gradients(state))

        def write(profiler: torch.profiler.profile) -> None:
            if len(found.recorded_s) == settings.steps:  # else what broke off is on its way, and a trace takes long
                profiler.export_chrome_trace(str(found.path))

        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice for users of the profiler, which this process's users are not
            with (
                profile(
                    activities=kinds,
                    schedule=schedule(wait=0, warmup=1, active=settings.steps, repeat=1),
                    on_trace_ready=write,
                    profile_memory=True,
                    acc_events=True,
                ) as profiler,
                ranges.installed(self._trainer.stepper, modules, before),
            ):
                self._window(settings)
                self._settle()
                if self._cuda:
                    torch.cuda.reset_peak_memory_stats(state.world.device)
                for _ in range(settings.steps):
                    self._settle()
                    found.gradients = found.gradients[: len(found.recorded_s)]  # not that of the window before
                    if not found.held:
                        found.held = held(self._trainer.host, state)
                    profiler.step()
                    with record_function(WINDOW):
                        found.recorded_s.append(self._window(settings))
                    assert state.window is not None
                    found.tokens.append(state.window.tokens)
                profiler.step()

    def _window(self, settings: Settings) -> float:
        """Run one window and return its seconds, until its last kernel is done."""
        trainer, state = self._trainer, self._trainer.state
        self._settle()
        began = time.perf_counter()
        self._heartbeat.beat(state.step, "data")
        with record_function(f"{PHASE}data"):
            state.window = state.loader.next()
        if state.window is None:
            raise RecipeError(_too_short(state.step, settings))
        trainer.stepper.run(self._stop.requested > 0, self._heartbeat.beat)
        if trainer.stepper.stop_votes:
            raise Interrupted(f"asked to stop in window {state.step}; no profile was written")
        trainer.stepper.post_step(state)
        state.extras.clear()
        self._settle()
        return time.perf_counter() - began

    def _settle(self) -> None:
        if self._cuda:
            torch.cuda.synchronize(self._trainer.state.world.device)


def _too_short(step: int, settings: Settings) -> str:
    return (
        f"the data end after {step} windows, and the profile needs {settings.windows}: {settings.warmup} to warm up, "
        f"one for the profiler and {settings.steps} to record. Lower --warmup or --steps, or raise "
        "training.max_epochs or training.max_tokens"
    )
