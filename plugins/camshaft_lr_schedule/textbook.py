"""The schedules as their papers write them, for proofs; shares nothing with the plugin."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from camshaft_lr_schedule import Options


def factor(options: Options, step: int, total: int) -> float:
    """Factor on the peak rate in step ``step`` (0 is the first) of ``total``."""
    ratio, floor = options.warmup_ratio, options.min_lr_ratio
    rising = options.warmup_steps if ratio is None else round(ratio * total)
    if step < rising:
        return (step + 1) / rising
    if options.type == "constant":
        return 1.0
    if options.type == "wsd":
        falling = max(1, round(total * options.wsd_decay_ratio))
        last = min(max(0, step + 1 - (total - falling)), falling)
        return 1.0 - (1.0 - floor) * last / falling
    falling = options.decay_steps or total - rising
    gone = min(1.0, (step - rising) / max(falling - 1, 1))
    if options.type == "cosine":
        return floor + (1.0 - floor) * math.cos(0.5 * math.pi * gone) ** 2
    if options.type == "linear":
        return 1.0 - (1.0 - floor) * gone
    return math.exp(gone * math.log(floor))
