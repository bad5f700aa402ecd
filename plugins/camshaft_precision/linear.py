"""A linear layer whose products are made of 8-bit numbers.

Forward x W^T, backward g W and g^T x. Activations and weights are e4m3; gradients are e5m2 with ``tensorwise``
(Micikevicius et al., arXiv:2209.05433), and e4m3 with ``rowwise``, where each row has its own scale (the recipe
``rowwise`` of torchao.float8). What a product sums over decides what a row is, so every product has scales of its own
with ``rowwise``. With ``wide`` the weight's product is made in bf16 (torchao's ``rowwise_with_gw_hp``).

Saved for backward are the input in bf16, which layers that share it share, and the weight itself; as without fp8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from camshaft_precision.choice import MULTIPLE
from camshaft_precision.scaled import E4M3, E5M2, Rounded, amax, product, quantise, round_to, scale_of

if TYPE_CHECKING:
    from camshaft_precision.delayed import Meter


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, source: Tensor, weight: Tensor, rowwise: bool, wide: bool, meter: Meter | None, note: bool
    ) -> Tensor:
        """``source`` [m, k] in bf16, ``weight`` [n, k]; [m, n] in bf16."""
        ctx.save_for_backward(source, weight)
        ctx.rowwise, ctx.wide, ctx.meter = rowwise, wide, meter
        left = _rounded(source, "input", E4M3, rowwise, meter, note)
        return product(left, _rounded(weight, "weight", E4M3, rowwise, meter, note), fast=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (source, weight), rowwise = ctx.saved_tensors, ctx.rowwise
        towards = product_of_weight = None
        if rowwise:
            if ctx.needs_input_grad[0]:
                left, right = (quantise(each, E4M3, rowwise=True) for each in (gradient, weight.t()))
                towards = product(left, right, fast=True)
            if ctx.needs_input_grad[1] and not ctx.wide:
                pair = (quantise(_padded(each).t(), E4M3, rowwise=True) for each in (gradient, source))
                product_of_weight = product(*pair, fast=True)
        else:
            # Scaled as a whole, a tensor has the same 8 bits in every product.
            rounded = _rounded(gradient, "gradient", E5M2, False, ctx.meter, True)
            if ctx.needs_input_grad[0]:
                right = _rounded(weight, "weight", E4M3, False, ctx.meter, False)
                towards = product(rounded, _turned(right), fast=False)
            if ctx.needs_input_grad[1] and not ctx.wide:
                right = _rounded(source, "input", E4M3, False, ctx.meter, False)
                left, right = (each._replace(values=_padded(each.values)) for each in (rounded, right))
                product_of_weight = product(_turned(left), _turned(right), fast=False)
        if ctx.needs_input_grad[1] and ctx.wide:
            product_of_weight = gradient.t().mm(source)
        if product_of_weight is not None:
            product_of_weight = product_of_weight.to(weight.dtype)
        return towards, product_of_weight, None, None, None, None


def _rounded(tensor: Tensor, what: str, dtype: torch.dtype, rowwise: bool, meter: Meter | None, note: bool) -> Rounded:
    if meter is None:
        return quantise(tensor, dtype, rowwise=rowwise)
    found = amax(tensor, rowwise=False)
    if note:
        meter.note(what, found)
    return round_to(tensor, dtype, meter.scale(what, scale_of(found, dtype)))


def _turned(rounded: Rounded) -> Rounded:
    """The transpose of what is scaled as a whole."""
    return rounded._replace(values=rounded.values.t())


def _padded(rows: Tensor) -> Tensor:
    """With rows of zeros up to a multiple of what kernels sum over."""
    missing = -len(rows) % MULTIPLE
    if not missing:
        return rows
    return torch.cat((rows, torch.zeros(missing, rows.shape[1], dtype=rows.dtype, device=rows.device)))


def forward_of(module: nn.Linear, *, rowwise: bool, wide: bool, meter: Meter | None) -> Callable[[Tensor], Tensor]:
    """A forward for ``module``: its input [..., k] in any dtype, its output [..., n] in bf16."""

    def forward(source: Tensor) -> Tensor:
        weight, bias = module.weight, module.bias
        narrow = source.to(torch.bfloat16)
        if not narrow.numel():
            return F.linear(narrow, weight.to(torch.bfloat16), None if bias is None else bias.to(torch.bfloat16))
        made: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            narrow.flatten(0, -2), weight, rowwise, wide, meter, torch.is_grad_enabled()
        )
        made = made.view(*narrow.shape[:-1], -1)
        return made if bias is None else made + bias.to(made.dtype)

    return forward
