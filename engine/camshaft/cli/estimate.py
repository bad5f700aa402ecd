"""The part of ``camshaft plan`` that counts bytes: model state on a rank, and what a rank sends in a step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from camshaft.activations import Kept, by_kind
from camshaft.cli.console import columns
from camshaft.errors import PluginError
from camshaft.estimate import Estimate, Sizes, StateBytes, combine
from camshaft.holding import chained, sizes
from camshaft.models.kept import Form, kept
from camshaft.peak import Peak
from camshaft.recipe.checks import micro_batch_size

if TYPE_CHECKING:
    from camshaft.claims import PlanContext
    from camshaft.host import Host
    from camshaft.recipe import Checked

__all__ = ["activations", "estimate", "form", "short", "show", "sizes"]


def activations(checked: Checked, host: Host, counted: Sizes) -> tuple[Kept, ...]:
    """What rank ``counted.rank`` keeps from forward to backward; nothing is known of a plugin's own model.

    Raises:
        PluginError: a plugin's answer is none.
    """
    context, config = checked.context, counted.config
    if config is None:
        return ()
    assert context is not None
    known = (*(counted.parameters or ()), *counted.borrowed)
    stages = {name: each.stage for each in known for name in (each.name, *each.tied)}
    found = kept(config, counted.widths, form(context), stages)
    return chained(host, "activations", (Kept, "Kept"), found, lambda ask, now: ask(context, counted, now))


def form(context: PlanContext) -> Form:
    """A microbatch; torch's operations are those of a GPU unless the recipe is for a CPU."""
    recipe = context.recipe
    device = "cpu" if "cpu" in (context.device, recipe.launch.device) else "cuda"
    data = recipe.data
    return Form(micro_batch_size(recipe), data.sequence_length, data.pack and data.document_mask, device)


def estimate(checked: Checked, host: Host, rank: int = 0, counted: Sizes | None = None) -> Estimate:
    """Every plugin's answer for ``rank`` as one; ``counted``: its sizes, where they are known.

    Raises:
        PluginError: a plugin's answer is none, or two tell the model state.
    """
    counted = sizes(checked, host, rank) if counted is None else counted
    answers = dict(host.call("estimate", checked.context, counted))
    for name, answer in answers.items():
        if answer is not None and not isinstance(answer, Estimate):
            raise PluginError(name, "estimate", f"must return an Estimate or None, got {type(answer).__name__}")
    return combine(answers, counted)


def show(found: Estimate, kept: tuple[Kept, ...], most: Peak | None, rank: int | None, own_model: bool) -> str:
    """Tables of memory and traffic of ``rank`` as text; None: of every rank. ``most``: the fullest moment, if known."""
    assert found.state is not None
    parts = [_memory(found, found.state, rank)]
    if most is not None:
        parts.append(_activations(kept, most))
    parts.append(_traffic(found, rank))
    if own_model:
        parts.append("counted for the recipe's model section; a plugin builds a model of its own")
    return "\n\n".join([*parts, *found.notes])


WORKSPACE = """\
(not counted: workspaces of libraries, fragments of the allocator, what an optimizer that is not fused makes for a
moment. On a GPU expect some hundred MiB more for context and workspaces; its own count is max_memory_allocated)"""


def _activations(kept: tuple[Kept, ...], most: Peak) -> str:
    rows = [_row(KINDS[made], size) for made, size in by_kind(kept).items()]
    rows.append(_row("activations, of all microbatches in flight", sum(each.held for each in kept)))
    rows.append(_row(f"peak with model state and buffers, in {most.moment}", most.bytes))
    rows.append(_row("of it gradients of activations, and other working memory", most.working))
    return "kept from forward to backward\n" + columns(("made by", "bytes", "GB", "GiB"), rows) + f"\n{WORKSPACE}"


KINDS: dict[str, str] = {
    "input": "residual stream, and token ids",
    "norm": "norms",
    "product": "matrix products",
    "rotation": "rotary embedding",
    "attention": "attention",
    "activation": "activation function",
    "logits": "logits",
    "loss": "cross-entropy",
    "weight": "casts of weights",
}
"""What ``Made`` is called in the table."""


def _memory(found: Estimate, state: StateBytes, rank: int | None) -> str:
    kinds = [
        ("parameters", state.parameters),
        ("gradients", state.gradients),
        ("master weights", state.masters),
        ("optimizer values", state.moments),
    ]
    known = [kind for kind in kinds if kind[1] != 0]
    buffers = [(f"buffer: {what}", size) for what, size in found.buffers]
    rows = [_row(*each) for each in (*known, ("model state", state.total), *buffers)]
    if buffers:
        rows.append(_row("with all buffers, at most", state.total + sum(size for _, size in buffers)))
    unknown = "\n(the owner of the optimizer does not say what it keeps)" if state.moments is None else ""
    title = "model state per rank" if rank is None else f"model state of rank {rank}"
    return f"{title}\n" + columns(("kind", "bytes", "GB", "GiB"), rows) + unknown


def _row(what: str, size: int | None) -> tuple[str, str, str, str]:
    if size is None:
        return (what, "unknown", "", "")
    return (what, f"{size:,}", short(size / 1e9), short(size / 2**30))


def _traffic(found: Estimate, rank: int | None) -> str:
    sums: dict[tuple[str, str], int] = {}
    for entry in found.sent:
        sums[entry.axis, entry.op] = sums.get((entry.axis, entry.op), 0) + entry.bytes
    rows = [(axis, op, f"{size:,}", short(size / 1e9)) for (axis, op), size in sums.items()]
    table = columns(("axis", "operation", "bytes", "GB"), rows) if rows else "(nothing, as far as plugins say)"
    return f"sent {'per rank and step' if rank is None else f'by rank {rank} in a step'}\n{table}"


def short(value: float) -> str:
    """Three significant digits or all before the point: 120, 31.4, 0.00123."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"
