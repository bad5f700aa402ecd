"""Bytes on a rank and bytes sent, as DeepSpeed spends them. Pure, without torch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from camshaft.estimate import Estimate, Sent, Sizes, replicated, state_bytes

if TYPE_CHECKING:
    from camshaft_deepspeed.options import Options

BUCKET = 500_000_000
"""DeepSpeed's default of ``reduce_bucket_size``, in elements."""


def estimate(options: Options, sizes: Sizes, ranks: int) -> Estimate:
    """Model state and traffic of one rank, offloaded or not.

    Stages 1 to 3 keep master weights beside the parameters in every dtype, and stages 1 and 2 reduce by all-reduce: 2 P
    for each reduction, where a reduce-scatter would send P.
    """
    if options.stage == 0:
        return replace(replicated(sizes), sent=_sent(options, sizes, ranks))
    widths = replace(sizes.widths, master=4)
    state = state_bytes(
        sizes.elements,
        widths,
        sizes.moments,
        trained=sizes.trained,
        parameters=ranks if options.stage == 3 else 1,
        gradients=ranks if options.stage > 1 else 1,
        optimizer=ranks,
    )
    stretch = -(-sizes.trained // ranks) * widths.master
    bucket = (options.reduce_bucket_size or BUCKET) * widths.param
    copies = 2 if options.overlap_comm and options.stage < 3 else 1
    return Estimate(
        state=replace(state, masters=stretch),
        buffers=(
            ("gradients in the masters' dtype, during the step", stretch),
            ("reduce bucket", bucket * copies),
        ),
        sent=_sent(options, sizes, ranks),
        notes=_notes(options),
    )


def _sent(options: Options, sizes: Sizes, ranks: int) -> tuple[Sent, ...]:
    if ranks == 1:
        return ()
    widths, windows = sizes.widths, sizes.accumulation
    gradients = sizes.trained * widths.reduce * (ranks - 1) / ranks
    updated = sizes.trained * widths.param * (ranks - 1) / ranks
    everything = sizes.elements * widths.param * (ranks - 1) / ranks
    match options.stage:
        case 0:
            calls = {"all_reduce": 2 * gradients}
        case 1:
            calls = {"all_reduce": 2 * gradients, "all_gather": updated}
        case 2:
            calls = {"all_reduce": 2 * gradients * windows, "all_gather": updated}
        case _:
            calls = {"reduce_scatter": gradients * windows, "all_gather": 2 * everything * windows}
    return tuple(Sent("dp", op, round(amount)) for op, amount in calls.items())


def _notes(options: Options) -> tuple[str, ...]:
    notes = []
    if options.stage == 3:
        notes.append(
            "deepspeed: parameters are gathered twice a microbatch at most; those within persistence_threshold or "
            "max_reuse_distance less often"
        )
    moved = {"optimizer": options.offload_optimizer, "parameters": options.offload_parameters}
    notes += [f"deepspeed: of this, {what} lie in {place}" for what, place in moved.items() if place != "none"]
    return tuple(notes)
