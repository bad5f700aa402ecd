"""Whether the model has the modules that `units` names, and none of them runs as a part of another. No torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from camshaft.errors import Problem
from camshaft_zero.grouping import matches, parent, piece

if TYPE_CHECKING:
    from camshaft.claims import PlanContext
    from camshaft.models.config import ModelConfig
    from camshaft_zero.options import Options


def idle(names: Collection[str], patterns: Sequence[str], key: str) -> Iterator[Problem]:
    """Patterns of units that choose nothing; ``names``: of all modules that hold parameters."""
    for index, pattern in enumerate(patterns):
        if not any(matches(name, pattern) for name in names):
            yield Problem(
                f"the pattern '{pattern}' matches no module that holds parameters",
                key=f"{key}.units.{index}",
                fix="write names as model.layers.* or model.layers.*.mlp; a * stands for one level",
            )


def inside(unit: str, outer: str, key: str) -> Problem:
    """The fault of a unit that runs as a part of a compiled module."""
    return Problem(
        f"'{unit}' is a unit inside of '{outer}', which runs as one (compiled) piece: nothing can be gathered in the "
        "middle of it",
        key=f"{key}.units",
        fix="choose whole layers as units, or compile smaller modules",
    )


def faults(options: Options, context: PlanContext, key: str) -> Iterator[Problem]:
    """What the built-in decoder lacks, where parameters are divided. Another model is looked at when it is built."""
    if context.config is None:
        return
    names = _holders(context.config)
    strange = tuple(idle(names, options.units or (), key))
    yield from strange
    compiled = context.recipe.plugins.get("compile")
    if strange or compiled is None:
        return
    from camshaft.models.stages import LLAMA

    layers = [f"{LLAMA.layers}.*"]
    patterns = getattr(compiled, "modules", None) or layers
    units = layers if options.units is None else options.units
    pieces = {name for name in names if any(matches(name, each) for each in patterns)}
    for name in (name for name in names if any(matches(name, each) for each in units)):
        outer = piece(name, pieces)
        if outer != name:
            yield inside(name, outer, key)
            return


def _holders(config: ModelConfig) -> dict[str, None]:
    """Modules of the built-in decoder with parameters inside, in its order."""
    from camshaft.models.names import parameter_names

    found: dict[str, None] = {}
    for name in parameter_names(config):
        around = []
        while name := parent(name):
            around.append(name)
        found.update(dict.fromkeys(reversed(around)))
    return found
