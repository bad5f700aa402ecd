"""Where the tensors of a checkpoint go, and what does not fit."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from camshaft_checkpoint.held import Held
from camshaft_checkpoint.index import Index
from camshaft_checkpoint.storage import DTYPES

_log = logging.getLogger(__name__)
FLOATING = frozenset({torch.bfloat16, torch.float16, torch.float32, torch.float64})
"""Dtypes of weights and optimizer state that policies choose among: one is read into another."""
Conversion = tuple[torch.dtype, torch.dtype]


@dataclass(slots=True)
class Targets:
    """What this rank reads, found without changing anything."""

    index: Index
    tensors: dict[str, Held] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    created: list[tuple[Tensor, str, Any]] = field(default_factory=list)
    """(what is updated, key, value) of optimizer state that does not exist yet."""
    placed: set[str] = field(default_factory=set)
    """Names with a place here that was filled otherwise."""
    converted: dict[str, Conversion] = field(default_factory=dict)

    def add(self, name: str, target: Held | None, *, converts: bool) -> None:
        """``name`` is read into ``target``; with ``converts`` also if the policy has another floating dtype now."""
        stored = self.index.tensors.get(name)
        if stored is None or target is None:
            self.faults.append(f"{name}: not in the checkpoint")
            return
        self.tensors[name] = target
        before, now = DTYPES[stored.dtype], target.dtype
        if stored.shape != tuple(target.shape):
            self.faults.append(f"{name}: shape {list(stored.shape)} in the checkpoint, {list(target.shape)} now")
        elif before != now and not (converts and {before, now} <= FLOATING):
            self.faults.append(f"{name}: {before} in the checkpoint, {now} now")
        elif before != now:
            self.converted[name] = before, now

    @property
    def names(self) -> list[str]:
        """Everything that has a place on this rank."""
        return sorted(self.tensors.keys() | self.placed)


def tell_conversions(folder: str, converted: dict[str, Conversion]) -> None:
    """One line for each pair of dtypes; a warning where values were rounded."""
    for (before, now), count in Counter(converted.values()).items():
        if torch.promote_types(before, now) != now:
            _log.warning(
                "%s holds %d tensor(s) in %s, which were rounded to %s: the run goes on with slightly other numbers",
                folder, count, before, now,
            )  # fmt: skip
        else:
            _log.info("%s holds %d tensor(s) in %s; they are %s now, unchanged", folder, count, before, now)
