"""Whether a plan fits the model that it is for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from camshaft.errors import Problem, RecipeError
from camshaft_tensor_parallel import agreement
from camshaft_tensor_parallel.styles import StylePlan

if TYPE_CHECKING:
    from camshaft.state import World


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
        *agreement.idle(_idle(plan, modules, world, plugin), plan.key),
        *agreement.without_style(plan, {name: _held(module) for name, module in modules.items()}),
        # A rank of a pipeline without the last stage keeps the loss, which it does not call, and not the projection.
        *agreement.incomplete(plan, modules, loss=world.makes_loss, sequence=sequence and not world.stages),
    ]
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


def _held(module: nn.Module) -> str:
    leaves = [leaf for leaf, _ in module.named_parameters(recurse=False)]
    return agreement.parameters(leaves) or (agreement.DROPOUT if isinstance(module, nn.Dropout) else "")
