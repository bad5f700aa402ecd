"""Whether a plan fits the model that it is for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from camshaft.errors import Problem, RecipeError
from camshaft_tensor_parallel.styles import StylePlan

if TYPE_CHECKING:
    from camshaft.state import World

NEEDED = ("embedding", "region", "logits", "loss")
"""What a model has to have where tokens are divided between regions."""


def read_plan(model: nn.Module, added: Mapping[str, str], plugin: str) -> StylePlan:
    """The model's own plan, then that of the recipe.

    Raises:
        RecipeError: there is neither.
    """
    tell = getattr(model, "tensor_parallel_plan", None)
    plan = StylePlan(tell() if callable(tell) else {}, added, f"plugins.{plugin}.plan")
    if not len(plan):
        raise RecipeError(
            Problem(
                f"{type(model).__name__} has no tensor_parallel_plan(), so nobody knows how to divide it",
                key=f"plugins.{plugin}",
                fix=f"give it that method, or say the styles of its modules in {plan.key}",
            )
        )
    return plan


def check(plan: StylePlan, model: nn.Module, world: World, plugin: str, *, sequence: bool) -> None:
    """Every fault of ``plan`` for ``model``, at once. All ranks call this.

    Raises:
        RecipeError: a glob matches nothing, a module in a region has no style, or styles that need each other are not
            all there.
    """
    modules = dict(model.named_modules())
    problems = [
        Problem(f"no module of the model matches '{glob}'", key=f"{plan.key}.{glob}", fix="correct or remove it")
        for glob in _idle(plan, modules, world, plugin)
    ]
    problems += _without_style(plan, modules)
    problems += _incomplete(plan, modules, world, sequence=sequence)
    if problems:
        raise RecipeError(problems)


def _idle(plan: StylePlan, modules: Mapping[str, nn.Module], world: World, plugin: str) -> list[str]:
    """The recipe's globs that match no module, on any stage."""
    idle = plan.idle(modules)
    stages = world.mesh.channel(plugin, "pp") if world.stages and plan.added else None
    if stages is None:
        return idle
    used = torch.tensor([float(glob not in idle) for glob in plan.added], device=world.device)
    stages.all_reduce(used, "shard_compute", "max").wait()
    return [glob for glob, found in zip(plan.added, used.tolist(), strict=True) if not found]


def _without_style(plan: StylePlan, modules: Mapping[str, nn.Module]) -> Iterator[Problem]:
    for name, module in modules.items():
        style, inside = plan.style(name), plan.region(name)
        own = [leaf for leaf, _ in module.named_parameters(recurse=False)]
        what = f"parameters ({', '.join(own)})" if own else "a dropout" if isinstance(module, nn.Dropout) else ""
        if what and inside and (style is None or style.kind == "region"):
            yield Problem(
                f"'{name or type(module).__name__}' has {what} in a region, and the plan does not say what it works on",
                key=plan.key,
                fix=f"name it there: inner if it sees a rank's own features, outer if it sees all of them"
                f"{', column or row if it is a product' if own else ''}",
            )


def _incomplete(
    plan: StylePlan, modules: Mapping[str, nn.Module], world: World, *, sequence: bool
) -> Iterator[Problem]:
    styles = [style for style in map(plan.style, modules) if style is not None]
    kinds = {style.kind for style in styles}
    # A rank of a pipeline without the last stage keeps the loss, which it does not call, and not the projection.
    if world.makes_loss and ("logits" in kinds) != ("loss" in kinds):
        has, lacks = ("logits", "loss") if "logits" in kinds else ("loss", "logits")
        yield Problem(
            f"a module has the style {has}, and none has {lacks}: a loss of logits that are divided has to know it",
            key=plan.key,
            fix=f"give the module with the {'cross-entropy' if lacks == 'loss' else 'output projection'} that style",
        )
    missing = [kind for kind in NEEDED if kind not in kinds] if sequence and not world.stages else []
    if missing:
        yield Problem(
            f"sequence_parallel divides tokens from the embedding to the loss, and no module has the style "
            f"{' or '.join(missing)}",
            key=plan.key,
            fix="name these modules there, or set sequence_parallel=false",
        )
