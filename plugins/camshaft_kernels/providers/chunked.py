"""Projection and cross-entropy in chunks of tokens: no full logits, and the gradient made in the forward.

The idea is that of Hsu et al. (Liger Kernel, arXiv:2410.10989, section 3.2). The softmax of a token needs its own
logits alone, so a chunk's logits give its loss and at once its gradients: of the hidden states, and of the weight,
which is added up over the chunks. Backward multiplies both by the one number that enters it.

Memory, for T tokens, V words and h features: one chunk of logits, twice, of about T h values each, instead of T V; from
forward to backward T h of hidden gradients and V h of the weight's. Products: the same three; the logits are not read
again from memory in backward.

The weight is used in the forward alone, where whoever stores parameters has it, so it may be gone in backward.
Autocast is followed. The loss and the softmax are in fp32 or wider; chunks of the weight's gradient are added in its
own dtype, or in fp32 where that is narrower.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from camshaft.ops import IGNORED
from camshaft_kernels.chunks import chunk_size


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int | None = None) -> Tensor:
    """Sum of the cross-entropies of ``hidden @ weight.T``, a scalar in fp32 or wider. Exactly 0 without a label.

    Args:
        hidden: [b, s, h].
        weight: [vocabulary, h]; autocast's dtype is that of the products, as for ``torch.nn.functional.linear``.
        labels: int64 [b, s], -100 for tokens that are not counted.
        chunk: tokens at once; by default so many that their logits take as much as the hidden states.

    Raises:
        RuntimeError: a second backward: the first one has used the gradients up.
    """
    rows = chunk or chunk_size(labels.numel(), *weight.shape)
    dtype = product_dtype(hidden)
    flat, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        loss: Tensor = _LinearCrossEntropy.apply(flat, weight, targets, rows, dtype)  # type: ignore[no-untyped-call]
        return loss
    return _run(flat, weight, targets, rows, dtype, (False, False))[0]


def product_dtype(tensor: Tensor) -> torch.dtype:
    """Dtype in which a matrix product of ``tensor`` runs here: autocast's, where it is on and the tensor no fp64."""
    kind = tensor.device.type
    if tensor.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return tensor.dtype


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
        loss, *gradients = _run(hidden, weight, labels, rows, dtype, ctx.needs_input_grad[:2])
        ctx.save_for_backward(*gradients)
        ctx.gain, ctx.dtypes = gain_of(dtype), (hidden.dtype, weight.dtype)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        # In place: these may be the largest tensors of the step. A second backward finds them changed, and is an error.
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        found = (None if each is None else each.mul_(factor / ctx.gain).to(dtype) for each, dtype in pairs)
        return *found, None, None, None


Made = tuple[Tensor, Tensor | None, Tensor | None]


def _run(
    hidden: Tensor, weight: Tensor, labels: Tensor, rows: int, dtype: torch.dtype, needs: tuple[bool, bool]
) -> Made:
    """(loss, gradient of ``hidden`` [T, h], gradient of ``weight``), gradients times ``gain_of(dtype)``, or None.

    Each gradient is in its tensor's dtype, but for that of a weight in fp16: until it is scaled it is fp32.
    """
    wide = torch.promote_types(dtype, torch.float32)
    sums = torch.promote_types(weight.dtype, torch.float32)
    loss = torch.zeros((), dtype=wide, device=hidden.device)
    towards = torch.empty_like(hidden) if needs[0] else None
    product = torch.zeros(weight.shape, dtype=sums, device=weight.device) if needs[1] else None
    with torch.autocast(hidden.device.type, enabled=False):
        table = weight.detach().to(dtype)
        for begin in range(0, hidden.shape[0], rows):
            part = hidden[begin : begin + rows].detach().to(dtype)
            losses, slope = _chunk(part, table, labels[begin : begin + rows], wide, any(needs))
            loss += losses
            if slope is None:
                continue
            gain = gain_of(dtype)
            if gain != 1:  # else a pass over all logits for nothing
                slope.mul_(gain)
            slope = slope.to(dtype)
            if towards is not None:
                towards[begin : begin + rows] = slope @ table
            if product is not None:
                _add_product(product, slope, part)
            del slope  # the next chunk's logits take its memory
    if product is not None and weight.dtype != torch.float16:
        product = product.to(weight.dtype)
    return loss, towards, product


def _chunk(
    part: Tensor, table: Tensor, labels: Tensor, wide: torch.dtype, slopes: bool
) -> tuple[Tensor, Tensor | None]:
    """(sum of the losses, their gradient by the logits) of a chunk."""
    logs = torch.log_softmax(part @ table.t(), -1, dtype=wide)
    ignored = labels == IGNORED
    places = labels.masked_fill(ignored, 0).unsqueeze(-1)
    losses = -logs.gather(-1, places).squeeze(-1).masked_fill(ignored, 0.0).sum()
    if not slopes:
        return losses, None
    slope = logs.exp_()
    slope.scatter_add_(-1, places, slope.new_full((), -1.0).expand(places.shape))
    return losses, slope.masked_fill_(ignored.unsqueeze(-1), 0.0)


def gain_of(dtype: torch.dtype) -> float:
    """What gradients of logits are multiplied by while they are in ``dtype``: fp16 loses what is below 6e-8, which the
    loss scale, that comes only in backward, cannot bring back.
    """
    return 1024.0 if dtype == torch.float16 else 1.0


def _add_product(total: Tensor, slope: Tensor, part: Tensor) -> None:
    if slope.dtype == torch.float16:  # sums over a chunk, times the gain, may be above what it holds
        slope, part = slope.to(total.dtype), part.to(total.dtype)
    if total.dtype == slope.dtype:
        total.addmm_(slope.t(), part)
    else:
        total.add_(slope.t() @ part)
