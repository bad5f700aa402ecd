"""What a placement costs: bytes of model state and buffers, and bytes sent, before anything is built. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from camshaft.estimate import CLOSING, PASSING, Estimate, Sent, Sizes, state_bytes
from camshaft_zero.grouping import Group, Item, buckets, by_module, kept, parent, slots

if TYPE_CHECKING:
    from camshaft.claims import PlanContext
    from camshaft_zero.options import Options
    from camshaft_zero.placement import Placement

TURNS = 2
"""Largest units whose full gradients there is room for at once, where they are summed in each microbatch."""
UNDER_WAY = 2
"""Units whose sums travel at the same time."""


def estimate(options: Options, placement: Placement, context: PlanContext, sizes: Sizes) -> Estimate:
    """State, buffers and traffic of one rank."""
    ranks = 1 if placement.shard is None else context.mesh[placement.shard].degree
    copies = 1 if placement.replicate is None else context.mesh[placement.replicate].degree
    each = summed_each(options, placement) and ranks * copies > 1
    state = state_bytes(
        sizes.elements,
        sizes.widths,
        sizes.moments,
        trained=sizes.trained,
        parameters=ranks if placement.parameters else 1,
        gradients=1 if whole_gradients(options, sizes, each) else ranks,
        optimizer=ranks * (copies if placement.optimizer_outer else 1),
    )
    divided = placement.parameters and ranks > 1
    groups = plan_groups(options, sizes, divided)
    slices = copies if placement.optimizer_outer else 1
    buffers = _buffers(options, sizes, groups, ranks * slices, divided, each)
    if sizes.widths.gradient != sizes.widths.master:
        widened = -(-sizes.trained // (ranks * slices)) * sizes.widths.master
        buffers.append((f"gradients in the masters' dtype, {CLOSING}", widened))
    sent = _sent(options, placement, sizes, groups, (ranks, copies), divided, each)
    return Estimate(state, tuple(buffers), tuple(entry for entry in sent if entry.bytes), tuple(_notes(sizes, each)))


def summed_each(options: Options, placement: Placement) -> bool:
    """Whether gradients are summed after each microbatch, so that no full ones are kept."""
    return placement.gradients and options.reduce != "last"


def whole_gradients(options: Options, sizes: Sizes, each: bool) -> bool:
    """Whether full gradients of all units are there at once: of several microbatches, or until backward is over."""
    return not each and (sizes.accumulation > 1 or not options.overlap)


def plan_groups(options: Options, sizes: Sizes, divided: bool) -> list[Group]:
    """Units as the run will make them; one of everything where the plan does not know the parameters."""
    if sizes.parameters is None:
        return [Group("model", [Item("model", sizes.trained, ("model",))])]
    items = [Item(each.name, each.elements, (each.name, *each.tied)) for each in sizes.parameters if each.trains]
    if not divided:
        return buckets(items, options.bucket_size_mb, sizes.widths.param)
    words = [name.split(".") for item in items for name in item.names]
    lists = {parent(".".join(name[: at + 1])) for name in words for at, word in enumerate(name) if word.isdigit()}
    return by_module(items, lists, options.units, int(options.unit_size_mb * 2**20 / sizes.widths.param))


def _buffers(
    options: Options, sizes: Sizes, groups: list[Group], divisor: int, divided: bool, each: bool
) -> list[tuple[str, int]]:
    widths = sizes.widths
    found = []
    if divided:
        taken: dict[object, int] = {}
        for group, key in zip(groups, slots(groups, options.prefetch, options.reshard_after_forward), strict=True):
            taken[key] = max(taken.get(key, 0), group.padded(divisor))
        found.append(("units that are gathered", sum(taken.values()) * widths.param))
    padded = sorted(group.padded(divisor) for group in groups)
    if each:
        found.append((f"full gradients of units {PASSING}", sum(padded[-TURNS:]) * widths.param))
    elif divisor > 1 and not whole_gradients(options, sizes, each):
        found.append((f"full gradients of units {PASSING}", sum(padded[-UNDER_WAY - 1 :]) * widths.gradient))
    if widths.reduce != (widths.param if each else widths.gradient) and divisor > 1:
        wire = sum(padded[-UNDER_WAY:]) * widths.reduce
        found.append((f"gradients in the dtype of the wire, of units {PASSING}", wire))
    return found


def _sent(
    options: Options,
    placement: Placement,
    sizes: Sizes,
    groups: list[Group],
    degrees: tuple[int, int],
    divided: bool,
    each: bool,
) -> list[Sent]:
    ranks, copies = degrees
    widths, windows = sizes.widths, sizes.accumulation
    slices = copies if placement.optimizer_outer else 1
    whole = sum(group.padded(ranks * slices) for group in groups)
    part = (ranks - 1) / ranks
    inner, outer = placement.shard or "dp", placement.replicate or "dp"
    sent = [Sent(inner, "reduce_scatter", round(part * whole * widths.reduce * (windows if each else 1)))]
    if divided:
        stays = 0 if not options.reshard_after_forward else sum(group.padded(ranks * slices) for group in kept(groups))
        gathers = (2 * whole - stays) if options.reshard_after_forward else whole
        sent.append(Sent(inner, "all_gather", round(part * gathers * windows * widths.param)))
    else:
        sent.append(Sent(inner, "all_gather", round(part * whole * widths.param)))
    stretch, apart = whole / ranks, (copies - 1) / copies
    if placement.optimizer_outer:
        sent.append(Sent(outer, "reduce_scatter", round(apart * stretch * widths.reduce)))
        sent.append(Sent(outer, "all_gather", round(apart * stretch * widths.param)))
    else:
        sent.append(Sent(outer, "all_reduce", round(2 * apart * stretch * widths.reduce)))
    return sent


def _notes(sizes: Sizes, each: bool) -> list[str]:
    """The price of the other answer to when gradients are summed."""
    if sizes.accumulation == 1:
        return []
    full, times = sizes.trained * sizes.widths.gradient, sizes.accumulation
    if each:
        return [f"reduce: each sums gradients {times} times a step; last once, and keeps {full / 1e9:.2f} GB of them"]
    return []
