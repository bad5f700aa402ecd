"""What a rank has of the model, for ``camshaft plan``: the parameters of the stages that a run gives it. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING

from camshaft.models.stages import LLAMA, stage_of
from camshaft.recipe.checks import batch_plan
from camshaft_pipeline.options import Split
from camshaft_pipeline.planning import schedule_of
from camshaft_pipeline.splitting import costs_of, spans_of

if TYPE_CHECKING:
    from camshaft.claims import PlanContext
    from camshaft.models.shapes import ParameterShape
    from camshaft_pipeline.options import Options
    from camshaft_pipeline.schedule import Schedule


def schedule_for(options: Options, context: PlanContext) -> Schedule:
    """The checked schedule of a plan that was accepted."""
    microbatches = batch_plan(context.recipe, context.mesh).accumulation
    return schedule_of(options, context.mesh["pp"].degree, microbatches)


def shapes(
    options: Options, context: PlanContext, parameters: Sequence[ParameterShape], rank: int
) -> list[ParameterShape]:
    """Those of ``parameters`` that ``rank`` has, each with its stage, and copies of tied ones that others own."""
    schedule = schedule_for(options, context)
    place, placement = context.mesh.coordinates(rank)["pp"], schedule.placement
    stages = _stages(options.split.model_dump_json(), tuple(_elements(parameters).items()), len(placement))
    last = max(parameter.layer for parameter in parameters)
    found = []
    for each in parameters:
        stage = stages[each.name]
        users = {name: stages[name] for name in each.tied if placement[stages[name]] != placement[stage]}
        if placement[stage] == place:
            tied = tuple(name for name in each.tied if name not in users)
            found.append(replace(each, stage=stage, tied=tied))
        for name, user in users.items():
            if placement[user] == place:
                found.append(replace(each, name=name, stage=user, tied=(), layer=last, owned=False))
    return found


def _elements(parameters: Sequence[ParameterShape]) -> dict[str, int]:
    """Elements of each parameter of the whole model; a tied one under all of its names, as the split counts it."""
    return {name: prod(each.whole_shape) for each in parameters for name in (each.name, *each.tied)}


@lru_cache(maxsize=8)
def _stages(split: str, elements: tuple[tuple[str, int], ...], stages: int) -> dict[str, int]:
    """Stage of each name; ``split`` is the recipe's section as JSON, so that ranks can share the answer."""
    names = dict(elements)
    layers = 1 + max(int(name.split(".")[2]) for name in names if name.startswith(f"{LLAMA.layers}."))
    spans = spans_of(Split.model_validate_json(split), *costs_of(names, layers, LLAMA), stages)
    return {name: stage_of(name, spans, LLAMA) for name in names}
