"""``provider: torch``: stages 2 and 3 and hybrid sharding by ``torch.distributed.fsdp.fully_shard`` (FSDP2).

Zhao et al., arXiv:2304.11277, in its per-parameter form. For models whose modules defeat flat buffers: parameters stay
DTensors, divided along their first dimension, so any optimizer and any module sees them one by one.

Units are the members of the outermost ModuleLists, and the root with all else. Stage 3 frees a unit's parameters after
its forward, the root's never before backward is over; stage 2 frees none before the window is over.

Invariant: gradients are sums over the data ranks (the core has divided the loss), in the policy's reduce dtype on the
wire; when the window ends each rank holds its shard of parameters, gradients and optimizer state, in the master dtype,
equal on ranks that replicate each other. Memory a rank, for N ranks that share a copy, P parameters, m, p and r bytes
of the master, parameter and reduce dtypes, k optimizer values: (2 + k) m P / N, and while a window runs p P (stage 2)
or two units (stage 3) of whole parameters; gradients in flight take one unit, and r P whole ones with ``reduce: last``
under accumulation. Traffic a rank and microbatch, times (N - 1) / N: stage 2 sends r P of gradients, and p P of
parameters once a window; stage 3 sends 2 p P + r P less the root's second gather; ``last`` sends gradients once a
window. Hybrid adds 2 r P / N of an all-reduce over the ranks that hold the same shard.

Every rank must use the same parameters in a microbatch, or their reductions do not meet: a rule of ``fully_shard``'s.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import Module, ModuleList, Parameter

from camshaft.errors import PluginError
from camshaft.models.init import materialize
from camshaft.parts import Part, Parts, Piece

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh

    from camshaft.data.loader import Batch
    from camshaft.hookspecs import Forward
    from camshaft.state import Policy, State, World


class TorchStorage:
    """Lays a model on meta out with ``fully_shard`` and runs its window: which backward reduces and what it frees.

    Args:
        world: with at least two data ranks.
        model: on meta; becomes an FSDPModule, its parameters DTensors on the data axes.
        reshard_after_forward: stage 3 if true, else stage 2.
        reduce: ``each`` microbatch sums gradients over ranks, or only the ``last`` of a window.

    Raises:
        PluginError: one data rank, or a parameter that cannot be divided.
    """

    def __init__(self, world: World, model: Module, *, reshard_after_forward: bool, reduce: str) -> None:
        self._keep, self._each = not reshard_after_forward, reduce == "each"
        mesh, precision = data_mesh(world), mixed_precision(world.policy)
        _refuse_others(model)
        for unit in units(model):
            fully_shard(unit, mesh=mesh, reshard_after_forward=reshard_after_forward, mp_policy=precision)
        # The root's last parameters are the first that backward needs: freeing them after forward saves nothing.
        self._root = fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=precision)
        self._units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for unit in self._units:
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)  # else a factor is a reduction that gloo does not have
        self._final = True
        self._shards: list[tuple[Parameter, Part]] = []
        self._parts: list[tuple[Parameter, Part]] = []

    def materialize(self, world: World, model: Module) -> None:
        """Give every rank the first values of its shards, in the master dtype, and say what they hold.

        Sets ``world.parts`` and ``world.stored``: a rank's rows of each parameter are a flat part, a plain tensor, so
        that optimizers need not know DTensors.
        """
        materialize(model, seed=world.recipe.seed, device=world.device, dtype=world.policy.master)
        channel = world.mesh.channel("zero", data_axes(world)[-1])
        parts = [(parameter, _part(name, world.roles[name], parameter)) for name, parameter in model.named_parameters()]
        self._shards = [(parameter, part) for parameter, part in parts if parameter.requires_grad]
        world.parts = Parts((part for _, part in self._shards), channel)
        world.stored = Parts((part for parameter, part in parts if not parameter.requires_grad), channel)
        world.readable = False
        self._parts = parts

    def around_forward(self, state: State, call: Forward) -> Forward:
        """Decide when a backward begins what it reduces and frees; after an evaluation free what it gathered."""

        def forward(batch: Batch) -> Tensor:
            loss = call(batch)
            if loss.requires_grad:
                # Only now is it known whether this microbatch's backward is the window's last.
                loss.register_hook(lambda _: self._begin_backward(state.final_backward))  # type: ignore[no-untyped-call]
            elif not torch.is_grad_enabled():
                self.reshard()
            return loss

        return forward

    @torch.no_grad()
    def reduce(self) -> None:
        """Hand the summed gradients to the parts; parameters that no rank used have none."""
        if self._parts:
            # The first forward moved shards of uneven parameters to longer storage, before anything was updated.
            for parameter, part in self._parts:
                part.tensor.data = _local(parameter)
            self._parts = []
        for parameter, part in self._shards:
            part.tensor.grad = None if parameter.grad is None else _local(parameter.grad)

    def reshard(self) -> None:
        """Free every whole parameter that is still there; the modules hold their shards again."""
        for unit in self._units:
            unit.reshard()

    def _begin_backward(self, final: bool) -> None:
        if final == self._final:
            return
        self._final = final
        if not self._each:
            self._root.set_requires_gradient_sync(final)
        if self._keep:
            self._root.set_reshard_after_backward(final)


def data_axes(world: World) -> tuple[str, ...]:
    """``dp``, or ``dp_replicate`` and ``dp_shard``; the last one is divided.

    Raises:
        PluginError: there is one data rank.
    """
    if world.mesh.device_mesh is None or world.mesh.degree("dp") == 1:
        raise PluginError(
            "zero",
            "shard_storage",
            "provider: torch divides over data ranks, and this run has one; start more processes, or set "
            "plugins.zero.provider=native",
        )
    return world.mesh.shape.members("dp")


def data_mesh(world: World) -> DeviceMesh:
    """The data axes as ``fully_shard`` wants them: one to divide over, or one to replicate over before it."""
    names, mesh = data_axes(world), world.mesh.device_mesh
    assert mesh is not None
    return mesh[names]


def mixed_precision(policy: Policy) -> MixedPrecisionPolicy:
    """Shards in the master dtype, gathered as ``policy.param``, summed as ``policy.reduce``.

    Inputs of modules are left alone, so that a model computes as it does without sharding.
    """
    gathered = None if policy.param == policy.master else policy.param
    return MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=policy.reduce, cast_forward_inputs=False)


def units(model: Module) -> list[Module]:
    """Members of the outermost ModuleLists that share no parameter with the rest of the model, in model order.

    A member that shares one stays with the root: ``fully_shard`` gives a parameter to one unit, and would untie it
    from the others in silence.
    """
    found = [module for module in _members(model) if any(True for _ in module.parameters())]
    slots = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    alone = []
    for module in dict.fromkeys(found):
        inside = Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))
        if all(slots[key] == count for key, count in inside.items()):
            alone.append(module)
    return alone


def _members(module: Module) -> list[Module]:
    if isinstance(module, ModuleList):
        return list(module)
    return [member for child in module.children() for member in _members(child)]


def _refuse_others(model: Module) -> None:
    for name, parameter in model.named_parameters():
        fault = "is a scalar; give it the shape [1]" if parameter.ndim == 0 else None
        fault = "is divided along another axis already" if isinstance(parameter, DTensor) else fault
        if fault is not None:
            raise PluginError(
                "zero",
                "shard_storage",
                f"provider: torch cannot divide parameter '{name}': it {fault}, or set plugins.zero.provider=native",
            )


def _part(name: str, role: str, parameter: Parameter) -> Part:
    """This rank's rows of a parameter; ``fully_shard`` divides as ``torch.chunk`` does: the last ranks get fewer."""
    flat = _local(parameter)
    rows, axis = parameter.shape[0], parameter.device_mesh  # type: ignore[attr-defined]  # of a DTensor
    first = min(axis.get_local_rank(axis.ndim - 1) * -(-rows // axis.size(axis.ndim - 1)), rows)
    start = first * (parameter.numel() // rows if rows else 0)
    pieces = (Piece(name, tuple(parameter.shape), start, 0, flat.numel()),) if flat.numel() else ()
    return Part(Parameter(flat, requires_grad=parameter.requires_grad), role, pieces)


def _local(tensor: Tensor) -> Tensor:
    """The shard of a DTensor as a 1-D view."""
    assert isinstance(tensor, DTensor)
    local: Tensor = tensor.to_local()
    return local.detach().view(-1)
