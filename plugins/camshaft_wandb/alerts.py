"""What is worth an alert: a loss that is no number, one that jumps, and a run from which nothing comes any more."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Annotated, NamedTuple

from pydantic import Field

import camshaft

_WATCHED = ("train/loss", "train/grad_norm", "eval/loss")
_KEPT, _ENOUGH = 50, 10
"""Losses that a new one is compared with, at most and at least."""


class Alerts(camshaft.Options):
    """``plugins.wandb.alerts`` of a recipe: what W&B tells people of, by mail or chat as they have set it up there."""

    non_finite: bool = True
    """When loss or gradient norm becomes NaN or infinite."""
    spike: Annotated[float, Field(gt=1)] | None = 1.5
    """When the training loss is above so many times the median of the last 50 records; `null`: never."""
    stall_s: Annotated[float, Field(gt=0)] | None = 1800.0
    """When no record has come for so many seconds; `null`: never. Longer than `log_every` steps take."""


class Alert(NamedTuple):
    """One message; ``level`` is W&B's: ``ERROR`` or ``WARN``."""

    title: str
    text: str
    level: str


class Watch:
    """Looks at records in order. Each trouble is told once, and again only after it was over."""

    def __init__(self, options: Alerts, run: str) -> None:
        self._options, self._run = options, run
        self._losses: deque[float] = deque(maxlen=_KEPT)
        self._told: set[str] = set()
        self._step = 0

    def observe(self, record: Mapping[str, float | int]) -> list[Alert]:
        """What a new record gives cause for."""
        self._step = int(record.get("progress/global_step", self._step))
        self._told.discard("stall")
        found = self._non_finite(record)
        spike = self._spike(record)
        return found if spike is None else [*found, spike]

    def silent(self, seconds: float) -> Alert | None:
        """What it gives cause for that no record has come for so long."""
        limit = self._options.stall_s
        if limit is None or seconds < limit or "stall" in self._told:
            return None
        self._told.add("stall")
        text = f"{self._run}: nothing has been recorded for {seconds:.0f} s, since step {self._step}."
        return Alert("Training has stalled", text, "WARN")

    def _non_finite(self, record: Mapping[str, float | int]) -> list[Alert]:
        if not self._options.non_finite:
            return []
        bad = [key for key in _WATCHED if not math.isfinite(record.get(key, 0.0)) and key not in self._told]
        self._told.update(bad)
        return [
            Alert(f"{key} is {record[key]}", f"{self._run}: {key} is {record[key]} at step {self._step}.", "ERROR")
            for key in bad
        ]

    def _spike(self, record: Mapping[str, float | int]) -> Alert | None:
        loss, factor = record.get("train/loss"), self._options.spike
        if loss is None or factor is None or not math.isfinite(loss):
            return None
        usual = median(self._losses) if len(self._losses) >= _ENOUGH else math.inf
        self._losses.append(loss)
        if loss <= factor * usual:
            self._told.discard("spike")
            return None
        if "spike" in self._told:
            return None
        self._told.add("spike")
        text = f"{self._run}: the training loss is {loss:.4g} at step {self._step}, and its median was {usual:.4g}."
        return Alert("The loss has jumped", text, "WARN")
