"""``docs/images/schedule-*.svg``: pipeline schedules on four ranks, drawn by the plugin's own drawing of them."""

from __future__ import annotations

from camshaft_pipeline.drawing import svg
from camshaft_pipeline.schedules import make
from camshaft_pipeline.simulator import simulate

RANKS, MICROBATCHES = 4, 8
SHOWN = ("1f1b", "interleaved_1f1b", "zb_h1", "zbv")


def pictures() -> dict[str, str]:
    """File name to image: every forward, backward of inputs and backward of weights takes 1."""
    return {f"schedule-{name}.svg": svg.draw(simulate(make(name, RANKS, MICROBATCHES)), width=900) for name in SHOWN}
