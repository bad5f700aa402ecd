"""What a rank has of each parameter, for ``camshaft plan``: the boxes that a run will make. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from camshaft.models.config import resolve
from camshaft.models.parallel import llama_plan
from camshaft.models.shapes import ParameterShape
from camshaft_tensor_parallel.division import box
from camshaft_tensor_parallel.styles import StylePlan

if TYPE_CHECKING:
    from camshaft.claims import PlanContext
    from camshaft_tensor_parallel import Options


def shapes(
    options: Options, context: PlanContext, parameters: Iterable[ParameterShape], rank: int
) -> Iterator[ParameterShape]:
    """``parameters`` in the shapes that they have on ``rank``, each with its box."""
    degree, place = context.mesh["tp"].degree, context.mesh.coordinates(rank)["tp"]
    plan = style_plan(options, context)
    for each in parameters:
        yield _divided(each, plan, degree, place)


def style_plan(options: Options, context: PlanContext, key: str = "plugins.tensor_parallel") -> StylePlan:
    """The built-in decoder's plan, then that of the recipe; ``key``: of the plugin there."""
    config = resolve(context.recipe.model, context.recipe.model.vocab_size or 1)  # no style depends on the vocabulary
    return _style_plan(tuple(llama_plan(config).items()), tuple(options.plan.items()), f"{key}.plan")


@lru_cache(maxsize=4)
def _style_plan(own: tuple[tuple[str, str], ...], added: tuple[tuple[str, str], ...], key: str) -> StylePlan:
    return StylePlan(dict(own), dict(added), key)


@lru_cache(maxsize=1 << 16)  # ranks that differ along other axes alone ask for the same
def _divided(each: ParameterShape, plan: StylePlan, degree: int, place: int) -> ParameterShape:
    found, local = box(each.name, each.shape, plan, degree, place)
    return replace(each, shape=local, box=found)
