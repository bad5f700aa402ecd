"""The factors: plain functions of progress."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from camshaft_lr_schedule import Options


def factor(options: Options, step: int, total: int) -> float:
    """Factor on the peak learning rate of step ``step`` (0 is the first) in a run of ``total`` steps.

    The warm-up rises from 1/warm-up steps to 1; the decay starts at 1 in the step after it and reaches
    ``min_lr_ratio`` in the last step; afterwards it stays there.
    """
    warmup = options.warmup_steps if options.warmup_ratio is None else round(options.warmup_ratio * total)
    if step < warmup:
        return (step + 1) / warmup
    if options.type == "constant":
        return 1.0
    if options.type == "wsd":
        length = max(round(options.wsd_decay_ratio * total), 1)
        done = step - (total - length) + 1  # the first step of the decay is already below the peak
        return _blend(1.0 - min(max(done, 0) / length, 1.0), options.min_lr_ratio)
    length = options.decay_steps or total - warmup
    progress = min((step - warmup) / max(length - 1, 1), 1.0)
    if options.type == "exponential":
        return float(options.min_lr_ratio**progress)
    if options.type == "cosine":
        return _blend(0.5 * (1.0 + math.cos(math.pi * progress)), options.min_lr_ratio)
    return _blend(1.0 - progress, options.min_lr_ratio)


def _blend(part: float, floor: float) -> float:
    return floor + (1.0 - floor) * part
