"""Hsu et al. (Liger Kernel, arXiv:2410.10989) from the package ``liger_kernel``, from version 0.6.

Its functions take the dtype of their first argument for the result, and some write over what they are given; here each
gets what it may have, so that results and gradients are those of ``camshaft.ops``.
"""

from __future__ import annotations

from typing import Any

import torch
from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction
from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
from liger_kernel.ops.layer_norm import LigerLayerNormFunction
from liger_kernel.ops.rms_norm import LigerRMSNormFunction
from liger_kernel.ops.rope import LigerRopeFunction
from liger_kernel.ops.swiglu import LigerSiLUMulFunction
from torch import Tensor

from camshaft.ops import IGNORED, Rope
from camshaft_kernels.devices import on_device_of
from camshaft_kernels.providers import norms
from camshaft_kernels.providers.chunked import product_dtype

_PLAIN = (None, IGNORED, 0.0, 0.0, "sum")
"""No weights of classes, ignored label, no z-loss, no smoothing, sum."""


def rms_norm() -> dict[str, Any]:
    """RMSNorm."""
    return norms.rms_norm(_rms_norm)


def layer_norm() -> dict[str, Any]:
    """LayerNorm."""
    return norms.layer_norm(_layer_norm)


def rope() -> dict[str, Any]:
    """Rotation of q and k at once."""
    return {"rope": _rope}


def swiglu() -> dict[str, Any]:
    """SwiGLU."""
    return {"swiglu": _swiglu}


def cross_entropy() -> dict[str, Any]:
    """Cross-entropy, its gradient in place of a copy of the logits."""
    return {"cross_entropy": _cross_entropy}


def linear_cross_entropy() -> dict[str, Any]:
    """Projection and loss in chunks of tokens."""
    return {"linear_cross_entropy": _linear_cross_entropy}


def _rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    # Not in place: what writes over the output's gradient is wrong where the output has another use.
    normed: Tensor = LigerRMSNormFunction.apply(hidden, weight, eps, 0.0, "llama", False)
    return normed


def _layer_norm(hidden: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    normed: Tensor = LigerLayerNormFunction.apply(hidden, weight, bias, eps)
    return normed


def _rope(q: Tensor, k: Tensor, angles: Rope, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    cos, signed = angles
    half = signed.shape[-1] // 2
    sin = torch.cat((signed[..., half:], signed[..., half:]), -1)  # Liger's own signs are in its kernel
    if not q.numel():
        return q.to(dtype), k.to(dtype)
    # Copies, because the rotation is written over what it gets; wide ones, because it rounds each of its products.
    wide = torch.promote_types(dtype, torch.float32)
    turned = (each.to(wide, copy=True).transpose(1, 2) for each in (q, k))
    with on_device_of(q):
        one, other = LigerRopeFunction.apply(*turned, cos.squeeze(2), sin.squeeze(2))
    return one.transpose(1, 2).to(dtype), other.transpose(1, 2).to(dtype)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    if not gate.numel():
        return gate * up
    with on_device_of(gate):
        mixed: Tensor = LigerSiLUMulFunction.apply(gate, up)
    return mixed


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    if not labels.numel():
        return logits.float().sum()
    # A copy even where it is fp32 already: the gradient is written over it.
    wide = logits.flatten(0, -2).to(torch.float32, copy=True)
    with on_device_of(logits):
        loss: Tensor = LigerCrossEntropyFunction.apply(wide, labels.flatten(), *_PLAIN)[0]
    return loss


def _linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    if not torch.is_grad_enabled():  # a Function is told what requires gradients, not whether anybody wants them
        hidden, weight = hidden.detach(), weight.detach()
    dtype = product_dtype(hidden)
    flat, table = hidden.flatten(0, -2).to(dtype), weight.to(dtype)
    if not labels.numel():
        return (flat @ table.t()).float().sum()
    with on_device_of(hidden), torch.autocast(hidden.device.type, enabled=False):
        made = LigerFusedLinearCrossEntropyFunction.apply(flat, table, labels.flatten(), None, *_PLAIN)
    loss: Tensor = made[0]
    return loss
