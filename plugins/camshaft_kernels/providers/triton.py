"""Camshaft's own kernels in Triton."""

from __future__ import annotations

from typing import Any


def rms_norm() -> dict[str, Any]:
    """RMSNorm, and with the residual's sum in the same pass."""
    from camshaft_kernels.triton.norm import add_rms_norm, rms_norm

    return {"rms_norm": rms_norm, "add_rms_norm": add_rms_norm}


def rope() -> dict[str, Any]:
    """Rotation of q and k in one launch."""
    from camshaft_kernels.triton.rope import rope

    return {"rope": rope}


def swiglu() -> dict[str, Any]:
    """SwiGLU, whose backward makes its product again."""
    from camshaft_kernels.triton.swiglu import swiglu

    return {"swiglu": swiglu}


def cross_entropy() -> dict[str, Any]:
    """The loss of given logits, of which nothing else is kept."""
    from camshaft_kernels.triton.loss import cross_entropy

    return {"cross_entropy": cross_entropy}


def linear_cross_entropy() -> dict[str, Any]:
    """Projection and loss in chunks of tokens; in evaluation the loss alone."""
    import torch
    from torch import Tensor

    from camshaft_kernels.triton.head import linear_cross_entropy as fused

    def call(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # a Function is told what requires gradients, not whether anybody wants them
            hidden, weight = hidden.detach(), weight.detach()
        return fused(hidden, weight, labels)

    return {"linear_cross_entropy": call}


def adamw() -> dict[str, Any]:
    """AdamW over lists of tensors with the factor on gradients, in one pass."""
    from camshaft_kernels.triton.adamw import adamw

    return {"updates.adamw": adamw}
