"""Keeps the modules of this rank's stages; parameters that several stages use stay with the first of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch.nn import Module, Parameter

from camshaft.errors import Problem, RecipeError
from camshaft.models.stages import Cuttable, Span, stage_of
from camshaft_pipeline.splitting import KEY, costs_of, spans_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from camshaft.state import World
    from camshaft_pipeline.options import Split


@dataclass(frozen=True, slots=True)
class Tie:
    """Parameter ``name`` of stage ``owner``, which stage ``user`` uses too, as ``leaf`` of its module ``module``.

    There it is a tensor and no parameter: it is in no part, in no norm and in no checkpoint.
    """

    name: str
    owner: int
    module: str
    leaf: str
    user: int


def cut(world: World, model: Module, split: Split, placement: Sequence[int]) -> tuple[Tie, ...]:
    """Remove what no stage of this rank needs; fill ``model.spans``, ``world.stages`` and ``world.makes_loss``.

    Names of parameters do not change. Returns all ties of the model, of every rank.

    Raises:
        RecipeError: the model cannot be cut, or not so, or nothing of it trains.
    """
    pipeline = _protocol(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise RecipeError("every parameter of the model is frozen: there is nothing to train")
    layers = model.get_submodule(pipeline.layers)
    elements = {name: each.numel() for name, each in model.named_parameters(remove_duplicate=False)}
    costs = costs_of(elements, len(layers._modules), pipeline)
    spans = spans_of(split, *costs, len(placement), pipeline.layers)
    rank = world.mesh.shape.coordinates(world.rank)["pp"]
    own = {stage: span for stage, span in enumerate(spans) if placement[stage] == rank}
    stages = {name: stage_of(name, spans, pipeline) for name in elements}
    _check_members(stages, pipeline)
    ties = _ties(model, stages)
    _keep(model, pipeline, own)
    for tie in ties:
        if tie.user in own:
            _borrow(model, tie)
    model.spans = own  # type: ignore[assignment]  # the protocol's dict, not a submodule
    world.stages = {name: stages[name] for name, _ in model.named_parameters()}
    if not world.stages:
        raise RecipeError(
            Problem(
                f"no parameter is in the stages {sorted(own)} of rank {rank} along pp",
                key=KEY,
                fix="give it a layer that has parameters",
            )
        )
    world.makes_loss = len(placement) - 1 in own
    return ties


def _protocol(model: Module) -> Cuttable:
    pipeline = getattr(model, "pipeline", None)
    if not isinstance(pipeline, Cuttable) or not isinstance(getattr(model, "spans", None), dict):
        raise RecipeError(
            Problem(
                f"{type(model).__name__} does not say how it can be cut into stages",
                key="plugins.pipeline",
                fix="give it `pipeline` and `spans` as camshaft.models.stages describes, or remove plugins.pipeline",
            )
        )
    return pipeline


def _check_members(stages: dict[str, int], pipeline: Cuttable) -> None:
    """A parameter that every stage might use has no stage of its own, and its gradient would be a part of the sum."""
    known = (pipeline.layers, *pipeline.before, *pipeline.after)
    for name in stages:
        if not any(name.startswith(f"{part}.") or name == part for part in known):
            raise RecipeError(
                Problem(
                    f"parameter '{name}' is neither in the layers nor before nor after them",
                    key=KEY,
                    fix="name its module in the model's `pipeline.before` or `pipeline.after`",
                )
            )


def _ties(model: Module, stages: dict[str, int]) -> tuple[Tie, ...]:
    names: dict[Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    found = []
    for first, *others in names.values():
        for name in others:
            if stages[name] < stages[first]:
                raise RecipeError(
                    Problem(f"'{first}' is the same parameter as '{name}', of an earlier stage", key=KEY, fix=_ORDER)
                )
            if stages[name] != stages[first]:
                module, _, leaf = name.rpartition(".")
                found.append(Tie(first, stages[first], module, leaf, stages[name]))
    return tuple(found)


_ORDER = "register the modules of a model in the order in which they run"


def _keep(model: Module, pipeline: Cuttable, own: dict[int, Span]) -> None:
    numbers = {index for span in own.values() for index in range(span.begin, span.end)}
    layers = model.get_submodule(pipeline.layers)
    for name in list(layers._modules):
        if int(name) not in numbers:
            delattr(layers, name)
    for names, needed in (
        (pipeline.before, any(span.first for span in own.values())),
        (pipeline.after, any(span.last for span in own.values())),
    ):
        for name in () if needed else names:
            parent, _, leaf = name.rpartition(".")
            delattr(model.get_submodule(parent), leaf)


def _borrow(model: Module, tie: Tie) -> None:
    """Put a tensor without values into the place of a parameter that another stage owns."""
    module = model.get_submodule(tie.module)
    parameter = cast("Parameter", getattr(module, tie.leaf))
    delattr(module, tie.leaf)
    setattr(module, tie.leaf, torch.empty_like(parameter.detach(), requires_grad=False))
