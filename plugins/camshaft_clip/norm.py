"""The global norm over plain, divided and laid-out gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from camshaft.parts import Parts


def clip_(parts: Parts, max_norm: float | None) -> Tensor:
    """Clip in place; return the norm before clipping, a scalar in fp32 or wider on the gradients' device.

    Parts without a gradient are left out. A NaN or infinite norm makes every gradient NaN or zero, and is
    returned as it is: the core refuses it at the next log interval.
    """
    gradients = [tensor.grad for tensor in parts.tensors if tensor.grad is not None]
    norm = global_norm(gradients, parts)
    if max_norm is not None and gradients:
        coefficient = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        # On a CPU looking costs nothing, and a pass over all gradients that multiplies by 1 is saved. NaN is not 1.
        if not (coefficient.is_cpu and bool(coefficient == 1.0)):
            torch._foreach_mul_([_local(gradient) for gradient in gradients], coefficient)
    return norm


def global_norm(gradients: Sequence[Tensor], parts: Parts) -> Tensor:
    """L2 norm over all gradients, each counted once.

    Where parts are divided over ranks, the squares of all are summed over those. Gradients that are DTensors
    contribute their local shard; their squares are summed over the mesh axes that they are sharded on, one reduction
    for each distinct layout. Without any gradient it is 0.
    """
    layouts: dict[object, list[Tensor]] = {}
    for gradient in gradients:
        layouts.setdefault(_layout(gradient), []).append(gradient)
    alone = parts.channel is None or parts.channel.size == 1
    if alone and len(layouts) == 1 and not isinstance(gradients[0], DTensor):
        return _local_norm(gradients)
    squares = [_reduced_square(members) for members in layouts.values()]
    device = parts.tensors[0].device if len(parts) else None
    total = torch.stack(squares).sum() if squares else torch.zeros((), device=device)
    if parts.channel is not None and not alone:
        total = total.double()  # one dtype on all ranks, also on those that hold nothing
        parts.channel.all_reduce(total, "clip").wait()
        wide = any(tensor.dtype == torch.float64 for tensor in parts.tensors)
        return total.sqrt().to(torch.float64 if wide else torch.float32)
    return total.sqrt()


def _reduced_square(members: Sequence[Tensor]) -> Tensor:
    square = _local_norm([_local(member) for member in members]).square()
    first = members[0]
    if isinstance(first, DTensor):
        for axis, placement in enumerate(first.placements):
            if placement.is_partial():
                raise ValueError("a gradient is still partial: it was not reduced before the norm was taken")
            if placement.is_shard():
                torch.distributed.all_reduce(square, group=first.device_mesh.get_group(axis))
    return square


def _local_norm(tensors: Sequence[Tensor]) -> Tensor:
    wide = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    norms = torch._foreach_norm(list(tensors), 2.0, dtype=wide)
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


def _layout(gradient: Tensor) -> object:
    if isinstance(gradient, DTensor):
        return (gradient.device_mesh, gradient.placements, gradient.dtype)
    return gradient.dtype


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
