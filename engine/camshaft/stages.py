"""In which pipeline stages' backwards a parameter of this rank gets a gradient."""

from __future__ import annotations

from collections.abc import Mapping

from torch.nn import Module, Parameter

Stages = frozenset[int]
ONLY: Stages = frozenset((0,))
"""Where nothing divides the model into stages."""


def stages_of(model: Module, stages: Mapping[str, int]) -> dict[Parameter, Stages]:
    """For each parameter of ``model`` the stages (``world.stages``) that use it; {0} where nothing is divided.

    A tied parameter may be used in several: in those of all its names, and in any of the rank's where ``stages`` does
    not tell one of them.
    """
    every: Stages = frozenset(stages.values()) or ONLY
    found: dict[Parameter, Stages] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        own = frozenset((stages[name],)) if name in stages else every
        found[parameter] = found.get(parameter, frozenset()) | own
    return found


def strange_stage(name: str, stage: int, stages: Stages) -> RuntimeError:
    """The fault of a gradient that comes in the backward of a stage that does not have the parameter."""
    known = ", ".join(map(str, sorted(stages)))
    return RuntimeError(
        f"the gradient of '{name}' came in the backward of stage {stage}, and world.stages has it in {known}: the "
        "owner of `split` must name the stage of every name of a parameter"
    )
