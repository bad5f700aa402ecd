"""The largest micro batch that fits: candidates, the order in which they are tried, and what is written of it.

Candidates divide what a data rank has of the global batch, so the global batch stays as it is. The plan says where to
begin; only a trial says what fits. Imports no torch: trials are runs of their own, in processes that end, so that
neither a broken context nor fragments of one candidate's memory are there in the next, or in the run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isqrt
from pathlib import Path
from typing import Any

from camshaft.errors import OutOfMemory

FILE = "micro_batch.json"
"""In the run directory: what was found, and how."""

ABOVE = 1.2
"""Candidates whose planned peak is above the memory by this factor are not tried; less than that a plan may be off."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What became of one candidate."""

    micro_batch_size: int
    fits: bool
    peak_bytes: int | None = None
    """The most that a rank held, where it came to its end."""
    why: str = ""
    """What ended it."""


@dataclass(frozen=True, slots=True)
class Found:
    """A choice, and what it rests on."""

    micro_batch_size: int
    planned: int
    """What the plan alone chose."""
    memory_bytes: int
    """Of one rank."""
    global_batch_size: int
    data_ranks: int
    trials: list[Trial] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Leave it in a run directory."""
        (folder / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    def serves(self, global_batch_size: int, data_ranks: int) -> bool:
        """Whether it was found for the same batch on as many ranks."""
        return (self.global_batch_size, self.data_ranks) == (global_batch_size, data_ranks)


def read(folder: Path) -> Found | None:
    """What an earlier start of the run in ``folder`` found; None if it found nothing, or nothing that can be read."""
    try:
        given: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return Found(**{**given, "trials": [Trial(**each) for each in given["trials"]]})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def candidates(global_batch_size: int, data_ranks: int, microbatches: int = 1) -> list[int]:
    """Every size that divides what a data rank has of the global batch, ascending.

    Those that leave fewer than ``microbatches`` are left out, if others are there: a pipeline with fewer microbatches
    than ranks waits more than it works.
    """
    own = global_batch_size // data_ranks
    most = max(1, own // microbatches)
    small = [size for size in range(1, isqrt(own) + 1) if own % size == 0]
    return [size for size in sorted({*small, *(own // size for size in small)}) if size <= most]


def planned(peaks: Mapping[int, int], memory: int) -> int:
    """The largest size whose planned peak fits into ``memory``; the smallest of all if none does."""
    return max((size for size, peak in peaks.items() if peak <= memory), default=min(peaks))


def search(peaks: Mapping[int, int], memory: int, attempt: Callable[[int], Trial]) -> tuple[int, list[Trial]]:
    """The largest size that ``attempt`` says fits, and every trial made.

    It begins where the plan says, goes down until one fits, or up from there while the plan finds it thinkable.

    Raises:
        OutOfMemory: the smallest does not fit either.
    """
    sizes: Sequence[int] = sorted(peaks)
    trials: list[Trial] = []

    def fits(size: int) -> bool:
        trials.append(attempt(size))
        return trials[-1].fits

    place = sizes.index(planned(peaks, memory))
    if fits(sizes[place]):
        while place + 1 < len(sizes) and peaks[sizes[place + 1]] <= ABOVE * memory and fits(sizes[place + 1]):
            place += 1
        return sizes[place], trials
    while place > 0:
        place -= 1
        if fits(sizes[place]):
            return sizes[place], trials
    raise OutOfMemory(
        f"no micro batch fits into {memory / 2**30:.3g} GiB a rank: also {sizes[0]} does not ({trials[-1].why}). "
        "Shorten data.sequence_length, recompute activations, or divide the model over more ranks"
    )
