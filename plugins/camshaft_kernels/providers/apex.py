"""NVIDIA apex with its CUDA extensions (``amp_C``, ``fused_layer_norm_cuda``): norms, optimizers and the norm of lists.

The optimizers' kernels are called on the lists that the optimizer plugins keep, so state, checkpoints and layouts are
theirs. apex has no factor on gradients that works for every dtype; where there is one, it takes a pass of its own.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from camshaft_kernels.providers import norms

CHUNK = 2048 * 32
"""Elements that a block of apex's kernels works on, as apex itself launches them."""


def rms_norm() -> dict[str, Any]:
    """FusedRMSNorm."""
    return norms.rms_norm(_rms_norm)


def layer_norm() -> dict[str, Any]:
    """FusedLayerNorm."""
    return norms.layer_norm(_layer_norm)


def adamw() -> dict[str, Any]:
    """The kernel of FusedAdam, in its decoupled mode."""
    return {"updates.adamw": _adamw}


def lamb() -> dict[str, Any]:
    """The kernel of FusedLAMB, without its own clipping."""
    return {"updates.lamb": _lamb}


def grad_norm() -> dict[str, Any]:
    """The norm of a list of tensors in one launch."""
    return {"grad_norm": _grad_norm}


def _rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    with torch.autocast(hidden.device.type, enabled=False):  # apex would cast to autocast's dtype
        normed: Tensor = fused_rms_norm_affine(hidden, weight, tuple(weight.shape), eps)
    return normed


def _layer_norm(hidden: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    with torch.autocast(hidden.device.type, enabled=False):
        normed: Tensor = fused_layer_norm_affine(hidden, weight, bias, tuple(weight.shape), eps)
    return normed


@cache
def _flag(device: torch.device) -> Tensor:
    """Where a kernel notes a value that is not finite. Nobody reads it: the engine looks at loss and norm."""
    return torch.zeros(1, dtype=torch.int32, device=device)


def _adamw(
    parameters: list[Tensor],
    gradients: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    scale: Tensor | None,
) -> None:
    import amp_C

    if not parameters:
        return
    _scale(gradients, scale)
    decoupled, corrected = 1, 1
    amp_C.multi_tensor_adam(
        CHUNK, _flag(parameters[0].device), [gradients, parameters, means, squares], lr, *betas, eps, step, decoupled,
        corrected, weight_decay,
    )  # fmt: skip


def _lamb(
    parameters: list[Tensor],
    gradients: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    scale: Tensor | None,
) -> None:
    import amp_C

    if not parameters:
        return
    _scale(gradients, scale)
    device = parameters[0].device
    corrected, averaged, decoupled, everywhere = 1, 1, 1, False
    norm, limit = torch.zeros(1, device=device), 1.0  # a norm below the limit: gradients stay as they are
    amp_C.multi_tensor_lamb(
        CHUNK, _flag(device), [gradients, parameters, means, squares], lr, *betas, eps, step, corrected, weight_decay,
        averaged, decoupled, norm, limit, everywhere,
    )  # fmt: skip


def _grad_norm(tensors: list[Tensor]) -> Tensor:
    import amp_C

    if not tensors:
        return torch.zeros(())
    norm: Tensor = amp_C.multi_tensor_l2norm(CHUNK, _flag(tensors[0].device), [tensors], False)[0]
    return norm.squeeze()


def _scale(gradients: list[Tensor], scale: Tensor | None) -> None:
    if scale is not None:
        torch._foreach_mul_(gradients, scale)
