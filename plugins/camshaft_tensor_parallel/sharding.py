"""A model divided: boxes of its parameters, forwards of its modules, and which gradients are partial."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn

from camshaft.comm import Channel
from camshaft.errors import Problem, RecipeError
from camshaft.models.roles import owned_parameters
from camshaft_tensor_parallel.copies import Copies
from camshaft_tensor_parallel.division import box
from camshaft_tensor_parallel.install import install, narrow_parameter, uninstall
from camshaft_tensor_parallel.line import Line
from camshaft_tensor_parallel.styles import Style, StylePlan

if TYPE_CHECKING:
    from camshaft.state import World


class Sharding:
    """What ``shard_compute`` did to ``model``, which is on meta."""

    def __init__(self, options: Any, world: World, model: nn.Module, plugin: str) -> None:
        """Divide it.

        Raises:
            RecipeError: it has no plan, the plan does not fit it, or its sizes do not divide.
        """
        channel = world.mesh.channel(plugin, "tp")
        assert channel is not None, "plan refuses one rank"
        self.line = Line(channel, sequence=options.sequence_parallel)
        self.plan = read_plan(model, options.plan, plugin)
        styles = {name: (module, self.plan.style(name)) for name, module in model.named_modules()}
        styled = {name: (module, style) for name, (module, style) in styles.items() if style is not None}
        self._check(world, styles, plugin)
        self._changed = install(styled, self.line)
        self.partial: dict[str, int] = {}
        """Names of parameters whose gradients are partial, and how many ranks have the same copy."""
        for owned in list(owned_parameters(model)):
            found, local = box(owned.name, tuple(owned.parameter.shape), self.plan, channel.size, channel.rank)
            world.boxes[owned.name] = found
            narrow_parameter(owned.parameter, local)
            if owned.parameter.requires_grad and found.copies > 1 and self._is_partial(owned.name):
                self.partial[owned.name] = found.copies

    def copies(self, world: World, model: nn.Module, plugin: str) -> tuple[Copies, ...]:
        """Sums of partial gradients, one for each number of ranks that have the same copy. All ranks call this."""
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        return tuple(
            Copies(
                world.parts,
                {name: shapes[name] for name, copies in self.partial.items() if copies == count},
                _sharers(world, count, plugin),
            )
            for count in sorted(set(self.partial.values()))
        )

    def close(self) -> None:
        """Undo what was put on modules."""
        uninstall(self._changed)

    def _is_partial(self, name: str) -> bool:
        """Whether each rank computes a part of the gradient: from its tokens, or from its heads."""
        module, _, leaf = name.rpartition(".")
        style = self.plan.style(module)
        if style is not None and style.kind in ("inner", "shared"):
            return True
        return self.line.sequence

    def _check(self, world: World, styles: Mapping[str, tuple[nn.Module, Style | None]], plugin: str) -> None:
        idle = self.plan.idle(styles)
        if idle and not world.stages:
            raise RecipeError(
                [
                    Problem(f"no module of the model matches '{glob}'", key=f"{self.plan.key}.{glob}", fix="correct it")
                    for glob in idle
                ]
            )
        for name, (module, style) in styles.items():
            own = [leaf for leaf, _ in module.named_parameters(recurse=False)]
            if style is None and own and self.plan.region(name):
                raise RecipeError(
                    Problem(
                        f"module '{name}' in a region has parameters ({', '.join(own)}), and the plan has no style for it",
                        key=self.plan.key,
                        fix=f"say {name}: column, row, inner or outer",
                    )
                )


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


def _sharers(world: World, count: int, plugin: str) -> Channel:
    """The channel to ranks with the same copies, and to those with other pieces of them along data axes."""
    shape, own = world.mesh.shape, world.mesh.place
    data = () if world.parts.channel is None else tuple(world.parts.channel.axis.split("+"))
    axis = shape.joined(*data, "tp")
    if count == world.mesh.degree("tp"):
        channel = world.mesh.channel(plugin, axis)
        assert channel is not None
        return channel
    free = set(axis.split("+"))

    def together(place: Mapping[str, int]) -> bool:
        same = all(place[each.name] == own[each.name] for each in shape.axes if each.name not in free)
        return same and place["tp"] // count == own["tp"] // count

    ranks = [rank for rank in range(shape.world_size) if together(shape.coordinates(rank))]
    timeout = timedelta(seconds=world.recipe.launch.group_timeout_s)
    group = dist.new_group(ranks, timeout=timeout, use_local_synchronization=True)
    return Channel(group, plugin, axis, timeout)
