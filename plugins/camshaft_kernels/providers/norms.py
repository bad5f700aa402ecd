"""What packages with norms of single tensors lack of ``camshaft.ops``: mixed dtypes, and the residual, which is added
before, in torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from camshaft_kernels.devices import on_device_of

RMSNorm = Callable[[Tensor, Tensor, float], Tensor]
"""(input [..., h], weight [h], eps) to the norm, all in one dtype."""
LayerNorm = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""The same with a bias [h] behind the weight."""


def rms_norm(norm: RMSNorm) -> dict[str, Any]:
    """Entries of ``camshaft.ops`` from ``norm``, which is called in the wider of both dtypes and never with nothing."""

    def alone(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        if not hidden.numel():
            return hidden * weight
        wide = torch.promote_types(hidden.dtype, weight.dtype)
        with on_device_of(hidden):
            return norm(hidden.to(wide), weight.to(wide), eps)

    def of_sum(hidden: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        summed = residual + hidden
        return alone(summed, weight, eps), summed

    return {"rms_norm": alone, "add_rms_norm": of_sum}


def layer_norm(norm: LayerNorm) -> dict[str, Any]:
    """The same for ``layer_norm``; where there is no bias, ``norm`` gets zeros."""

    def alone(hidden: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        bias = torch.zeros_like(weight) if bias is None else bias
        if not hidden.numel():
            return hidden * weight + bias
        wide = torch.promote_types(hidden.dtype, weight.dtype)
        with on_device_of(hidden):
            return norm(hidden.to(wide), weight.to(wide), bias.to(wide), eps)

    return {"layer_norm": alone}
