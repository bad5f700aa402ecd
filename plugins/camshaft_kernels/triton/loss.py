"""Cross-entropy of logits: the softmax's normaliser in one pass over each row, the gradient in another.

Milakov and Gimelshein 2018 (online softmax): a running maximum, and a sum of exponentials that is rescaled when the
maximum grows. Arithmetic is in fp32 (fp64 of fp64) whatever the logits' dtype, without a copy of them in it. A row
whose label is not counted is not read, has loss 0 and gradient 0. A label outside of the vocabulary makes the loss nan.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from camshaft.ops import IGNORED
from camshaft_kernels.devices import on_device_of
from camshaft_kernels.triton.launch import ceil_div, check, computed, jit, narrow, power_of_two, rows, warps, wide

ELEMENTS = 4096
"""Elements of a row that are loaded at a time."""

UNCOUNTED = tl.constexpr(IGNORED)


@jit
def normalise(
    logits: tl.tensor, columns: tl.tensor, LOOPS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr
) -> tl.tensor:
    """(Largest logit of one row, sum of exponentials of all less that): apart, large logits cost no digits."""
    largest = tl.full((), float("-inf"), dtype=WIDE)
    total = tl.zeros((), dtype=WIDE)
    for turn in range(LOOPS):
        column = turn * BLOCK + tl.arange(0, BLOCK)
        value = wide(tl.load(logits + column, mask=column < columns, other=float("-inf")))
        grown = tl.maximum(largest, tl.max(value, 0))
        pivot = tl.where(grown == float("-inf"), 0.0, grown)  # all masked so far: -inf less itself is nan
        total = total * tl.exp(largest - pivot) + tl.sum(tl.exp(value - pivot), 0)
        largest = grown
    return largest, total


@jit
def loss_kernel(
    logits: tl.tensor, stride: tl.tensor, labels: tl.tensor, losses: tl.tensor,
    peaks: tl.tensor, totals: tl.tensor, columns: tl.tensor, gain: tl.tensor,
    IN_PLACE: tl.constexpr, LOOPS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """One row: its loss, largest logit and sum; with ``IN_PLACE`` the logits become ``gain`` times their gradient."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    start = logits + row * stride
    if label == UNCOUNTED:
        tl.store(losses + row, 0.0)
        tl.store(peaks + row, 0.0)
        tl.store(totals + row, 1.0)
        if IN_PLACE:
            for turn in range(LOOPS):
                column = turn * BLOCK + tl.arange(0, BLOCK)
                nothing = tl.zeros((BLOCK,), dtype=logits.dtype.element_ty)
                tl.store(start + column, nothing, mask=column < columns)
    else:
        peak, total = normalise(start, columns, LOOPS, BLOCK, losses.dtype.element_ty)
        known = (label >= 0) & (label < columns)
        chosen = wide(tl.load(start + label, mask=known, other=float("nan")))
        tl.store(losses + row, (peak - chosen) + tl.log(total))
        tl.store(peaks + row, peak)
        tl.store(totals + row, total)
        if IN_PLACE:
            tl.debug_barrier()  # the label's logit is read by one thread and overwritten by another
            for turn in range(LOOPS):
                column = turn * BLOCK + tl.arange(0, BLOCK)
                there = column < columns
                value = wide(tl.load(start + column, mask=there, other=float("-inf")))
                found = (tl.exp(value - peak) / total - tl.where(column == label, 1.0, 0.0)) * gain
                tl.store(start + column, narrow(found, logits.dtype.element_ty), mask=there)


@jit
def gradient_kernel(
    logits: tl.tensor, stride: tl.tensor, labels: tl.tensor, peaks: tl.tensor, totals: tl.tensor,
    upstream: tl.tensor, gradient: tl.tensor, columns: tl.tensor, blocks: tl.tensor, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """One block of one row of ``blocks`` blocks: (softmax - 1 at the label) times ``upstream``, one number."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(labels + row)
    there = column < columns
    read = column < tl.where(label == UNCOUNTED, 0, columns)
    value = wide(tl.load(logits + row * stride + column, mask=read, other=float("-inf")))
    found = tl.exp(value - tl.load(peaks + row)) / tl.load(totals + row) - tl.where(column == label, 1.0, 0.0)
    found = found * wide(tl.load(upstream))
    tl.store(gradient + row * columns + column, narrow(found, gradient.dtype.element_ty), mask=there)


def losses_of(matrix: Tensor, labels: Tensor, *, in_place: bool, gain: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """(Losses, largest logits, sums of exponentials) of the rows of ``matrix`` [n, vocabulary], [n] in fp32 or wider.

    ``in_place``: afterwards ``matrix`` holds ``gain`` times the gradient of the sum of the losses.
    """
    count, columns = matrix.shape
    losses = torch.empty(count, dtype=computed(matrix.dtype), device=matrix.device)
    peaks, totals = torch.empty_like(losses), torch.empty_like(losses)
    if count:
        block = min(power_of_two(columns), ELEMENTS)
        with on_device_of(matrix):
            loss_kernel[(count,)](
                matrix, matrix.stride(0), labels, losses, peaks, totals, columns, gain,
                IN_PLACE=in_place, LOOPS=ceil_div(columns, block), BLOCK=block, num_warps=warps(2 * block),
            )  # fmt: skip
    return losses, peaks, totals


class _CrossEntropy(torch.autograd.Function):
    """``cross_entropy`` with its gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        matrix, flat = rows(logits), labels.reshape(-1).contiguous()
        losses, peaks, totals = losses_of(matrix, flat, in_place=False)
        ctx.save_for_backward(matrix, flat, peaks, totals)
        ctx.shape = logits.shape
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        matrix, labels, peaks, totals = ctx.saved_tensors
        count, columns = matrix.shape
        gradient = torch.empty(count, columns, dtype=matrix.dtype, device=matrix.device)
        if count:
            block = min(power_of_two(columns), ELEMENTS)
            blocks = ceil_div(columns, block)
            with on_device_of(matrix):
                gradient_kernel[(count * blocks,)](
                    matrix, matrix.stride(0), labels, peaks, totals, upstream, gradient, columns, blocks,
                    BLOCK=block, num_warps=warps(2 * block),
                )  # fmt: skip
        return gradient.view(ctx.shape), None


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the tokens' cross-entropies, a scalar in fp32 or wider. Exactly 0 where no token is counted.

    ``logits`` [..., vocabulary] with any distance between rows; ``labels`` int64 [...] with -100 for tokens that are
    not counted. Keeps the logits as they are and two numbers a row.

    Raises:
        MachineError: kernels cannot run here.
        ValueError: the shapes do not fit each other.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"cross_entropy takes a label a row, not {[*labels.shape]} labels for {[*logits.shape]}")
    check(logits, labels)
    loss: Tensor = _CrossEntropy.apply(logits, labels)  # type: ignore[no-untyped-call]
    return loss
