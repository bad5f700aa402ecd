"""What a rank of a run that is not built holds of the model, and what plugins find wrong with that. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from camshaft.claims import TOKENS, Widths
from camshaft.errors import PluginError, Problem
from camshaft.estimate import Sizes
from camshaft.models.shapes import ParameterShape, parameter_shapes

if TYPE_CHECKING:
    from camshaft.host import Host
    from camshaft.mesh import MeshShape
    from camshaft.models.config import ModelConfig
    from camshaft.recipe import Checked


def misfits(checked: Checked, host: Host) -> list[Problem]:
    """What plugins find wrong with what ranks hold, of the first rank that has a fault; every plan was accepted.

    Raises:
        PluginError: a plugin's answer is none.
    """
    if checked.mesh is None or checked.batch is None or checked.context is None or checked.context.config is None:
        return []
    asked = host.implementations("misfits")
    for rank in places(checked.mesh) if asked else ():
        counted = sizes(checked, host, rank)
        found = [
            _a_problem(name, each) for name, function in asked for each in function(checked.context, counted) or ()
        ]
        if found:
            return found
    return []


def _a_problem(name: str, found: object) -> Problem:
    if not isinstance(found, Problem):
        raise PluginError(name, "misfits", f"must give Problems, got {type(found).__name__}")
    return found


def places(mesh: MeshShape) -> list[int]:
    """The first rank of each place on the axes that do not split the batch."""
    found, stride = [0], 1
    for axis in reversed(mesh.axes):
        if not axis.splits_batch:
            found = [each + digit * stride for digit in range(axis.degree) for each in found]
        stride *= axis.degree
    return sorted(found)


@lru_cache(maxsize=4)
def _whole(config: ModelConfig) -> tuple[ParameterShape, ...]:
    return tuple(parameter_shapes(config))


def sizes(checked: Checked, host: Host, rank: int = 0) -> Sizes:
    """What bytes of ``rank`` are counted from; a plugin's own model is as large as the recipe's ``model`` section says.

    Raises:
        PluginError: a plugin's answer to ``shapes`` is none.
    """
    assert checked.config is not None and checked.batch is not None  # a checked recipe has them
    plans = checked.plans.values()
    common: dict[str, Any] = {
        "accumulation": checked.batch.accumulation,
        "widths": next((plan.widths for plan in plans if plan.widths is not None), Widths()),
        "moments": next((plan.moments for plan in plans if plan.moments is not None), None),
        "rank": rank,
    }
    if host.implementations("build_model"):
        elements = checked.config.num_parameters()
        return Sizes(elements=elements, trained=elements, parameters=None, **common)
    whole = _whole(checked.config)
    here = _of_rank(checked, host, whole, rank)
    own = tuple(each for each in here if each.owned)
    return Sizes(
        elements=sum(each.elements for each in own),
        trained=sum(each.elements for each in own if each.trains),
        parameters=own,
        borrowed=tuple(each for each in here if not each.owned),
        whole=whole,
        config=checked.config,
        hidden=_hidden(checked, checked.config),
        **common,
    )


def _hidden(checked: Checked, config: ModelConfig) -> int:
    """Elements of a microbatch's hidden states on a rank: divided along axes of which a plan says so."""
    assert checked.context is not None and checked.batch is not None
    recipe, mesh = checked.context.recipe, checked.context.mesh
    facts = {fact for plan in checked.plans.values() for fact in plan.provides}
    ranks = math.prod(axis.degree for axis in mesh.axes if f"{TOKENS}@{axis.name}" in facts)
    return -(-checked.batch.micro_batch_size * recipe.data.sequence_length // ranks) * config.hidden_size


def _of_rank(
    checked: Checked, host: Host, parameters: tuple[ParameterShape, ...], rank: int
) -> tuple[ParameterShape, ...]:
    return chained(
        host,
        "shapes",
        (ParameterShape, "ParameterShapes"),
        parameters,
        lambda ask, now: ask(checked.context, now, rank),
    )


T = TypeVar("T")


def chained(
    host: Host, hook: str, kind: tuple[type[T], str], found: tuple[T, ...], ask: Callable[[Any, tuple[T, ...]], Any]
) -> tuple[T, ...]:
    """What plugins make of ``found`` one after another; ``ask`` calls one of them with what it is by then.

    ``kind``: class of what is in an answer, and what messages call that.

    Raises:
        PluginError: a plugin's answer is none.
    """
    for name, function in host.implementations(hook):
        answer = ask(function, found)
        if answer is None:
            continue
        found = tuple(answer)
        strange = next((each for each in found if not isinstance(each, kind[0])), None)
        if strange is not None:
            raise PluginError(name, hook, f"must return {kind[1]} or None, got {type(strange).__name__}")
    return found
