"""The part of ``camshaft plan`` that counts bytes: model state on a rank, and what a rank sends in a step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from camshaft.claims import PlanContext, Widths
from camshaft.cli.console import columns
from camshaft.errors import PluginError
from camshaft.estimate import Estimate, Sizes, StateBytes, combine
from camshaft.models.shapes import parameter_shapes

if TYPE_CHECKING:
    from camshaft.host import Host
    from camshaft.recipe import Checked, Resolved


def sizes(checked: Checked, host: Host) -> Sizes:
    """What bytes are counted from; a plugin's own model is as large as the recipe's ``model`` section says."""
    assert checked.config is not None and checked.batch is not None  # a checked recipe has them
    shapes = None if host.implementations("build_model") else tuple(parameter_shapes(checked.config))
    elements = checked.config.num_parameters()
    plans = checked.plans.values()
    return Sizes(
        elements=elements,
        trained=elements if shapes is None else sum(each.elements for each in shapes if each.trains),
        accumulation=checked.batch.accumulation,
        widths=next((plan.widths for plan in plans if plan.widths is not None), Widths()),
        moments=next((plan.moments for plan in plans if plan.moments is not None), None),
        parameters=shapes,
    )


def estimate(resolved: Resolved, checked: Checked, host: Host) -> Estimate:
    """Every plugin's answer as one.

    Raises:
        PluginError: a plugin's answer is none, or two tell the model state.
    """
    assert checked.mesh is not None
    context = PlanContext(resolved.recipe, checked.mesh, tuple(resolved.recipe.plugins), "any")
    counted = sizes(checked, host)
    answers = dict(host.call("estimate", context, counted))
    for name, answer in answers.items():
        if answer is not None and not isinstance(answer, Estimate):
            raise PluginError(name, "estimate", f"must return an Estimate or None, got {type(answer).__name__}")
    return combine(answers, counted)


def show(resolved: Resolved, checked: Checked, host: Host) -> str:
    """Tables of memory and traffic, as text."""
    found = estimate(resolved, checked, host)
    assert found.state is not None
    parts = [_memory(found, found.state), _traffic(found)]
    if host.implementations("build_model"):
        parts.append("counted for the recipe's model section; a plugin builds a model of its own")
    return "\n\n".join([*parts, *found.notes])


def _memory(found: Estimate, state: StateBytes) -> str:
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
    return "model state per rank\n" + columns(("kind", "bytes", "GB", "GiB"), rows) + unknown


def _row(what: str, size: int | None) -> tuple[str, str, str, str]:
    if size is None:
        return (what, "unknown", "", "")
    return (what, f"{size:,}", short(size / 1e9), short(size / 2**30))


def _traffic(found: Estimate) -> str:
    rows = [(entry.axis, entry.op, f"{entry.bytes:,}", short(entry.bytes / 1e9)) for entry in found.sent]
    table = columns(("axis", "operation", "bytes", "GB"), rows) if rows else "(nothing, as far as plugins say)"
    return f"sent per rank and step\n{table}"


def short(value: float) -> str:
    """Three significant digits or all before the point: 120, 31.4, 0.00123."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"
