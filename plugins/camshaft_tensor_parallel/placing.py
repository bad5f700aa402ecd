"""Which modules of a model may draw random numbers where ranks have parts, and how many heads a rank has there."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from camshaft_tensor_parallel.division import box
from camshaft_tensor_parallel.drawing import may_draw
from camshaft_tensor_parallel.line import Line
from camshaft_tensor_parallel.shares import Place
from camshaft_tensor_parallel.styles import StylePlan


def places(plan: StylePlan, model: nn.Module, line: Line) -> dict[str, Place]:
    """Module name to place, of a model that is not divided yet.

    Where tokens are whole between regions, what is drawn there is drawn for all ranks alike: then one look at it from
    the model itself, in the first window, is enough.
    """
    found: dict[str, Place] = {}
    between = False
    for name, module in model.named_modules():
        style = plan.style(name)
        kind = None if style is None else style.kind
        if kind not in (None, "region", "inner", "outer") or not may_draw(module):
            continue
        region = plan.region(name)
        inside = region and kind != "outer"
        if region or line.sequence:
            heads = _heads(plan, model, _region(plan, name), line) if inside else None
            found[name] = Place(name, inside, heads, told=kind == "inner")
        else:
            between = True
    if between:
        found[""] = Place("", inside=False)
    return found


def _region(plan: StylePlan, name: str) -> str:
    """The smallest region around module ``name``, or itself."""
    while name and ((style := plan.style(name)) is None or style.kind != "region"):
        name = name.rpartition(".")[0]
    return name


def _heads(plan: StylePlan, model: nn.Module, region: str, line: Line) -> frozenset[int] | None:
    """Heads of a rank by the products of ``region``; None where none of them is cut between heads."""
    return frozenset(_local_units(plan, model, region, line)) or None


def _local_units(plan: StylePlan, model: nn.Module, region: str, line: Line) -> Iterator[int]:
    for name, module in model.named_modules():
        style = plan.style(name)
        divides = style is not None and style.kind in ("column", "shared") and style.unit > 1
        if style is None or not divides or not name.startswith(f"{region}."):
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            _, local = box(f"{name}.{leaf}", tuple(parameter.shape), plan, line.size, line.rank)
            yield local[0] // style.unit
