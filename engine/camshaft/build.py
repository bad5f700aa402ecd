"""Building a run: every phase in its fixed order, each plugin in recipe order, each change checked.

``plan`` (before this, without torch) -> precision -> kernels -> rewrite -> build_model (meta) -> split ->
shard_compute -> recompute -> compile_model -> shard_storage -> materialize -> optimizer -> schedule -> bind
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Module
from torch.optim import Optimizer

from camshaft.claims import Plan
from camshaft.errors import PluginError
from camshaft.host import Host
from camshaft.masters import Masters, whole_parts
from camshaft.models.config import ModelConfig
from camshaft.ops import Kernel
from camshaft.program import Action, window_program
from camshaft.state import Policy, State, World

if TYPE_CHECKING:
    from camshaft.data.loader import Loader
    from camshaft.distributed import Control

CHAINS = ("shard_compute", "recompute", "compile_model", "shard_storage")
"""Phases in which every plugin may change the model in place, in this order, after ``split``."""

SINGLE = Policy(torch.float32, torch.float32, torch.float32, torch.float32)
"""Policy of a recipe without a precision plugin."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How one parameter is laid out: what a phase may change only if it claimed it."""

    shape: tuple[int, ...]
    placement: str
    dtype: torch.dtype
    trains: bool


def build(
    host: Host, world: World, config: ModelConfig, plans: Mapping[str, Plan], loader: Loader, control: Control
) -> tuple[State, tuple[Action, ...]]:
    """Run the build phases and return the state and the checked program of one window."""
    precision = host.owner("precision")
    if precision is not None:
        world.policy = _expect(precision[0], "precision", precision[1](world), Policy)
    world.kernels = _kernels(host, world)
    config = _rewrite(host, world, config)
    model = _model(host, world, config)
    world.roles = roles(model)
    for phase in CHAINS:
        _chain(host, phase, world, model, plans)
    _check_boxes(world, model)
    masters = _materialize(host, world, model)
    _connect_parts(world)
    owner = host.owner("optimizer")
    if owner is None:
        raise PluginError("?", "optimizer", "no plugin owns the optimizer; `camshaft validate` says how to add one")
    optimizer: Optimizer = _expect(owner[0], "optimizer", owner[1](world, model), Optimizer)
    _check_optimizer(owner[0], optimizer, world)
    state = State(
        world=world, config=config, model=model, optimizer=optimizer, loader=loader, control=control, masters=masters
    )
    return state, window_program(host, world.mesh.shape, world.rank, world.batch.accumulation)


def _kernels(host: Host, world: World) -> list[Kernel]:
    return [
        _noted(world, name, _expect(name, "kernels", kernel, Kernel))
        for name, function in host.implementations("kernels")
        for kernel in function(world)
    ]


def _noted(world: World, name: str, kernel: Kernel) -> Kernel:
    """``kernel``, whose plugin is known to have an effect as soon as somebody weighs it against others, or takes it."""

    def entries() -> dict[str, Any]:
        world.givers.add(name)
        return kernel.entries()

    def missing(world: World) -> str | None:
        world.givers.add(name)
        return kernel.missing(world)

    return replace(kernel, entries=entries, missing=missing)


def _rewrite(host: Host, world: World, config: ModelConfig) -> ModelConfig:
    for name, function in host.implementations("rewrite"):
        changed = function(world, config)
        if changed is not None:
            config = _expect(name, "rewrite", changed, ModelConfig)
    return config


def _model(host: Host, world: World, config: ModelConfig) -> Module:
    owner = host.owner("build_model")
    with torch.device("meta"):
        if owner is None:
            from camshaft.models.llama import Llama

            model: Module = Llama(config, world.ops)
        else:
            model = _expect(owner[0], "build_model", owner[1](world, config), Module)
    told = owner is not None and getattr(model, "draws", True)
    world.draws = bool(told) or any(plugin.draws for plugin in host.plugins.values())
    splitter = host.owner("split")
    if splitter is not None:
        model = _expect(splitter[0], "split", splitter[1](world, model), Module)
    return model.train()


def roles(model: Module) -> dict[str, str]:
    """Role of each parameter: what the model says, else by its number of dimensions."""
    tell = getattr(model, "roles", None)
    declared: dict[str, str] = tell() if callable(tell) else {}
    return {
        name: declared.get(name, "matrix" if parameter.ndim >= 2 else "bias" if name.endswith("bias") else "norm")
        for name, parameter in model.named_parameters()
    }


def layouts(model: Module) -> dict[str, Layout]:
    """Layout of each parameter as seen from outside; DTensors tell their placements, and on which axes."""
    return {
        name: Layout(
            tuple(parameter.shape),
            _placement(parameter),
            parameter.dtype,
            parameter.requires_grad,
        )
        for name, parameter in model.named_parameters()
    }


def _placement(parameter: torch.nn.Parameter) -> str:
    mesh = getattr(parameter, "device_mesh", None)
    return "" if mesh is None else f"{getattr(parameter, 'placements', '')} on {mesh.mesh_dim_names}"


def _chain(host: Host, phase: str, world: World, model: Module, plans: Mapping[str, Plan]) -> None:
    for name, function in host.implementations(phase):
        before = layouts(model)
        function(world, model)
        _check_layouts(name, phase, before, layouts(model), plans.get(name, Plan()))


def bind_plugins(host: Host, state: State, plans: Mapping[str, Plan]) -> None:
    """Call every ``bind``; it takes references and changes no parameter's name, layout or ``requires_grad``."""
    for name, function in host.implementations("bind"):
        before = layouts(state.model)
        function(state)
        _check_layouts(name, "bind", before, layouts(state.model), plans.get(name, Plan()))


def _check_layouts(
    name: str, phase: str, before: Mapping[str, Layout], after: Mapping[str, Layout], plan: Plan
) -> None:
    """A phase may not rename parameters, nor lay out anew what its plugin did not claim."""
    if before.keys() != after.keys():
        gone, new = sorted(before.keys() - after.keys()), sorted(after.keys() - before.keys())
        raise PluginError(
            name, phase, f"parameter names changed: gone {gone[:3]}, new {new[:3]}; only `split` may do that"
        )
    targets = [claim.target for claim in plan.claims if claim.resource == "parameter.layout"]
    for parameter, layout in after.items():
        if layout != before[parameter] and not any(fnmatchcase(parameter, target) for target in targets):
            raise PluginError(
                name,
                phase,
                f"laid out '{parameter}' anew ({before[parameter]} -> {layout}) without a claim on parameter.layout",
            )


def _materialize(host: Host, world: World, model: Module) -> Masters | None:
    """Values for all parameters, and ``world.parts``; masters that the core has to keep are returned."""
    owner = host.owner("materialize")
    narrow = world.policy.master != world.policy.param
    if owner is not None:
        owner[1](world, model)
        if len(world.parts):
            return None
    else:
        from camshaft.models.init import materialize

        materialize(model, seed=world.recipe.seed, device=world.device, dtype=world.policy.master, boxes=world.boxes)
    if not narrow:
        world.parts = whole_parts(model, world.roles)
        return None
    masters = Masters(model, world.roles, world.policy)
    world.parts = masters.parts
    return masters


def _check_boxes(world: World, model: Module) -> None:
    """Where an axis divides parameters, a norm needs to know of each how often it is there."""
    if not world.boxes:
        return
    missing = [name for name, _ in model.named_parameters() if name not in world.boxes]
    if missing:
        raise PluginError(
            "?", "shard_compute", f"world.boxes tells nothing of {len(missing)} parameters, the first '{missing[0]}'"
        )


def _connect_parts(world: World) -> None:
    """Pieces learn of the whole parameters that they are of, and parts of the ranks that have the rest of the model."""
    shape = world.mesh.shape
    for parts in (world.parts, world.stored):
        parts.attach(world.boxes)
        data = () if parts.channel is None else tuple(parts.channel.axis.split("+"))
        for attribute, axes in (("holders", ("tp",)), ("everyone", ("tp", "pp"))):
            name = shape.joined(*data, *axes)
            if name != shape.joined(*data):
                setattr(parts, attribute, world.mesh.channel("core", name))


def _check_optimizer(name: str, optimizer: Optimizer, world: World) -> None:
    """An optimizer over anything but the parts would update what nobody reads, or parameters that others hold too."""
    known = {id(tensor) for tensor in world.parts.tensors}
    strange = [tensor for group in optimizer.param_groups for tensor in group["params"] if id(tensor) not in known]
    if strange:
        raise PluginError(
            name,
            "optimizer",
            f"{len(strange)} of its tensors, the first {list(strange[0].shape)}, are not what is to be updated: build "
            "it over world.parts.tensors, not over the model's parameters, which another plugin lays out",
        )


def _expect(plugin: str, hook: str, value: Any, wanted: type[Any]) -> Any:
    if not isinstance(value, wanted):
        raise PluginError(plugin, hook, f"must return a {wanted.__name__}, got {type(value).__name__}")
    return value
