"""The output projection and the cross-entropy in one, in chunks of tokens, without the logits of all.

A chunk's logits are made by torch's matrix product in a buffer that all chunks share; one kernel turns them into their
gradient in place (``loss.loss_kernel``); two products add what they give to the gradients of the hidden states and of
the weight. So the gradients of a loss of 1 exist after the forward, and the backward multiplies them by what comes to
the loss. After Wijmans et al. 2024 (Cut Your Losses) and Hsu et al. 2024 (Liger), who take the same way.

Kept: 4 * h bytes a token, and 4 * vocabulary * h of the weight's gradient: in fp32, because chunks are added up in it
and because the multiplication would round a second time. Besides, while it runs: one chunk's logits, at most
``CHUNK_BYTES``, where the plain form keeps tokens * vocabulary of them in two or three dtypes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from camshaft_kernels.chunks import CHUNK_BYTES, chunk_tokens, row_elements
from camshaft_kernels.triton.launch import check, computed, rows
from camshaft_kernels.triton.loss import losses_of

HALF_GAIN = 1024.0
"""fp16 gradients of logits are kept times this: at most 1 each, they would lose what is below 6e-8 otherwise."""


def dtype_of_products(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """That of autocast where it is on, as the plain projection would have; else the wider of both."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)


def adds_wide(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch adds a product of this dtype to an fp32 matrix on this GPU: not every version takes one."""
    key = (device, dtype)
    if key not in _ADDS_WIDE:
        total = torch.ones(16, 16, device=device)
        part = torch.ones(16, 16, device=device, dtype=dtype)
        try:
            torch.addmm(total, part, part, out_dtype=torch.float32, out=total)
            _ADDS_WIDE[key] = bool((total == 17).all())
        except (RuntimeError, TypeError):
            _ADDS_WIDE[key] = False
    return _ADDS_WIDE[key]


_ADDS_WIDE: dict[tuple[torch.device, torch.dtype], bool] = {}


def product(left: Tensor, right: Tensor, out: Tensor, *, add: bool) -> None:
    """``out`` (plus, with ``add``) ``left @ right``, whose sums are not rounded to the factors' dtype on the way."""
    if left.device.type != "cuda" or out.dtype == left.dtype:
        left, right = left.to(out.dtype), right.to(out.dtype)
        torch.addmm(out, left, right, beta=int(add), out=out)
    elif not add:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    elif not torch.compiler.is_compiling() and adds_wide(left.device, left.dtype):  # its fake tensors refuse this one
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
    else:
        out.add_(torch.mm(left, right, out_dtype=out.dtype))


def chunk_buffer(tokens: int, weight: Tensor) -> Tensor:
    """[tokens, vocabulary] for logits, with rows ``row_elements`` apart: products and wide loads want
    that, and a vocabulary of 50,257 has none. Graphs of torch.compile take no ``out`` with gaps, and do without.
    """
    vocabulary = weight.shape[0]
    words = vocabulary if torch.compiler.is_compiling() else row_elements(vocabulary)
    return torch.empty(tokens, words, dtype=weight.dtype, device=weight.device)[:, :vocabulary]


def losses_and_gradients(
    hidden: Tensor, weight: Tensor, labels: Tensor, wanted: tuple[bool, bool], chunk: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(Loss, the hidden states' gradient, the weight's), gradients in fp32 or wider and times ``gain_of``.

    ``hidden`` [n, h] and ``weight`` [vocabulary, h] of one dtype; ``wanted``: which of the gradients.
    """
    wide = computed(hidden.dtype)
    into_hidden = torch.empty_like(hidden, dtype=wide) if wanted[0] else None
    into_weight = torch.empty_like(weight, dtype=wide) if wanted[1] else None
    logits = chunk_buffer(chunk, weight)
    losses = torch.empty(hidden.shape[0], dtype=wide, device=hidden.device)
    for start in range(0, hidden.shape[0], chunk):
        part, span = hidden[start : start + chunk], slice(start, start + chunk)
        made = logits[: part.shape[0]]
        torch.mm(part, weight.t(), out=made)
        losses[span] = losses_of(made, labels[span], in_place=any(wanted), gain=gain_of(hidden.dtype))[0]
        if into_hidden is not None:
            product(made, weight, into_hidden[span], add=False)
        if into_weight is not None:
            product(made.t(), part, into_weight, add=start > 0)
    if into_weight is not None and not hidden.shape[0]:
        into_weight.zero_()
    return losses.sum(), into_hidden, into_weight


def gain_of(dtype: torch.dtype) -> float:
    """What gradients of logits of this dtype are multiplied by while they are kept in it."""
    return HALF_GAIN if dtype == torch.float16 else 1.0


def _scaled(gradient: Tensor | None, factor: Tensor, dtype: torch.dtype, shape: torch.Size) -> Tensor | None:
    """``gradient`` times ``factor``, rounded once, in memory of its own: a second backward finds it unchanged."""
    if gradient is None:
        return None
    made = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
    return torch.mul(gradient, factor, out=made).view(shape)


class _LinearCrossEntropy(torch.autograd.Function):
    """``linear_cross_entropy``, which has its gradients before it is asked for them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk_bytes: int) -> Tensor:
        dtype = dtype_of_products(hidden, weight)
        matrix, table = rows(hidden).to(dtype), weight.to(dtype)
        tokens = matrix.shape[0]
        chunk = chunk_tokens(tokens, weight.shape[0], dtype.itemsize, chunk_bytes)
        wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        with torch.autocast(hidden.device.type, enabled=False):
            flat = labels.reshape(-1).contiguous()
            loss, *made = losses_and_gradients(matrix, table, flat, wanted, max(chunk, 1))
        ctx.save_for_backward(*made)
        ctx.gain = gain_of(dtype)
        ctx.likes = [(tensor.dtype, tensor.shape) for tensor in (hidden, weight)]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        factor = upstream / ctx.gain
        made = (_scaled(gradient, factor, *like) for gradient, like in zip(ctx.saved_tensors, ctx.likes, strict=True))
        return *made, None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk_bytes: int = CHUNK_BYTES) -> Tensor:
    """Sum of the cross-entropies of ``hidden @ weight.T``: a scalar in fp32 or wider, 0 where no token is counted.

    ``hidden`` [..., h], ``weight`` [vocabulary, h], ``labels`` int64 [...] with -100 for tokens that are not counted.
    ``chunk_bytes``: how much memory the logits of one chunk may take.

    Raises:
        MachineError: kernels cannot run here.
        ValueError: the shapes do not fit each other.
    """
    if hidden.shape[:-1] != labels.shape or hidden.shape[-1] != weight.shape[-1]:
        shapes = ", ".join(str([*tensor.shape]) for tensor in (hidden, weight, labels))
        raise ValueError(f"linear_cross_entropy takes [..., h], [vocabulary, h] and [...], not {shapes}")
    check(hidden, weight, labels)
    if not torch.is_grad_enabled():  # a Function is told what requires gradients, not whether anybody wants them
        hidden, weight = hidden.detach(), weight.detach()
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, chunk_bytes)  # type: ignore[no-untyped-call]
    return loss
