"""Cross-entropy of logits: the softmax's normaliser in one pass over each row, the gradient in another.

Milakov and Gimelshein 2018 (online softmax): a running maximum, and a sum of exponentials that is rescaled when the
maximum grows; here one of both for each 16 bytes that a thread loads at a time, so that threads meet once a row and not
once a tile. Arithmetic is in fp32 (fp64 of fp64) whatever the logits' dtype, without a copy of them in it. A row whose
label is not counted is not read, has loss 0 and gradient 0. A label outside of the vocabulary makes the loss nan.

Where the gradient overwrites the logits, both passes are one launch, and the second goes backwards: what the first has
read last is still in the GPU's L2 cache. ``row_launch`` keeps as few rows in flight as fit there.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from camshaft.ops import IGNORED
from camshaft_kernels.devices import on_device_of
from camshaft_kernels.triton.launch import (
    VECTOR,
    ceil_div,
    check,
    computed,
    exponential,
    jit,
    narrow,
    power_of_two,
    rows,
    warps,
    wide,
)

ELEMENTS = 4096
"""Elements of a row that a program of the gradient alone takes."""

LOADS = 4
"""Loads of 16 bytes in flight for each thread of a program that takes a row in turns."""

ROW_BYTES = 8192
"""Bytes of a row for each warp: few warps for short rows, of which many are in flight."""

UNCOUNTED = tl.constexpr(IGNORED)


@jit
def fetch(
    start: tl.tensor, column: tl.tensor, columns: tl.tensor, MASKED: tl.constexpr, KEPT: tl.constexpr
) -> tl.tensor:
    """One tile [lanes, width] of the row, -inf where it ends. ``KEPT``: it will be read again."""
    there = column < columns if MASKED else None
    other = float("-inf") if MASKED else None
    return tl.load(start + column, mask=there, other=other, eviction_policy="evict_last" if KEPT else "")


@jit
def grow(tile: tl.tensor, largest: tl.tensor, total: tl.tensor) -> tl.tensor:
    """``largest`` [lanes] and ``total`` [lanes] with one more tile."""
    value = wide(tile)
    grown = tl.maximum(largest, tl.max(value, 1))
    pivot = tl.where(grown == float("-inf"), 0.0, grown)  # all masked so far: -inf less itself is nan
    return grown, total * exponential(largest - pivot) + tl.sum(exponential(value - pivot[:, None]), 1)


@jit
def normalise(
    start: tl.tensor, place: tl.tensor, columns: tl.tensor,
    FULL: tl.constexpr, TAIL: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
    KEPT: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """(Largest logit of one row, sum of exponentials of all less that): apart, large logits cost no digits.

    Each tile is loaded while the one before is summed.
    """
    largest = tl.full((LANES,), float("-inf"), dtype=WIDE)
    total = tl.zeros((LANES,), dtype=WIDE)
    tile = fetch(start, place, columns, FULL == 0, KEPT)
    for turn in range(1, FULL):
        later = fetch(start, turn * BLOCK + place, columns, False, KEPT)
        largest, total = grow(tile, largest, total)
        tile = later
    if FULL > 0 and TAIL:
        rest = fetch(start, FULL * BLOCK + place, columns, True, KEPT)
        largest, total = grow(tile, largest, total)
        tile = rest
    largest, total = grow(tile, largest, total)
    peak = tl.max(largest, 0)
    return peak, tl.sum(total * exponential(largest - tl.where(peak == float("-inf"), 0.0, peak)), 0)


@jit
def turn_into_gradient(
    start: tl.tensor, column: tl.tensor, columns: tl.tensor, label: tl.tensor,
    peak: tl.tensor, share: tl.tensor, gain: tl.tensor, MASKED: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of a row. ``share``: ``gain`` over the sum of exponentials."""
    there = column < columns if MASKED else None
    other = float("-inf") if MASKED else None
    value = wide(tl.load(start + column, mask=there, other=other, eviction_policy="evict_first"))
    found = exponential(value - peak) * share - tl.where(column == label, gain, 0.0)
    tl.store(start + column, narrow(found, start.dtype.element_ty), mask=there, eviction_policy="evict_first")


@jit
def clear(start: tl.tensor, column: tl.tensor, columns: tl.tensor, MASKED: tl.constexpr) -> None:
    """One tile of a row that does not count."""
    there = column < columns if MASKED else None
    tl.store(start + column, tl.zeros(column.shape, dtype=start.dtype.element_ty), mask=there)


@jit
def loss_kernel(
    logits: tl.tensor, stride: tl.tensor, labels: tl.tensor, losses: tl.tensor,
    peaks: tl.tensor, totals: tl.tensor, columns: tl.tensor, gain: tl.tensor,
    IN_PLACE: tl.constexpr, FULL: tl.constexpr, TAIL: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
) -> None:  # fmt: skip
    """One row: its loss, largest logit and sum; with ``IN_PLACE`` the logits become ``gain`` times their gradient.

    It is taken in ``FULL`` tiles [``LANES``, ``WIDTH``], and with ``TAIL`` one that it fills in part: a mask of unknown
    end would keep the others from wide loads.
    """
    BLOCK: tl.constexpr = LANES * WIDTH
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    start = logits + row * stride
    place = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    if label == UNCOUNTED:
        tl.store(losses + row, 0.0)
        tl.store(peaks + row, 0.0)
        tl.store(totals + row, 1.0)
        if IN_PLACE:
            for turn in range(FULL):
                clear(start, turn * BLOCK + place, columns, False)
            if TAIL:
                clear(start, FULL * BLOCK + place, columns, True)
    else:
        peak, total = normalise(start, place, columns, FULL, TAIL, LANES, BLOCK, losses.dtype.element_ty, IN_PLACE)
        known = (label >= 0) & (label < columns)
        chosen = wide(tl.load(start + label, mask=known, other=float("nan")))
        tl.store(losses + row, (peak - chosen) + tl.log(total))
        tl.store(peaks + row, peak)
        tl.store(totals + row, total)
        if IN_PLACE:
            tl.debug_barrier()  # the label's logit is read by one thread and overwritten by another
            share = gain / total
            if TAIL:
                turn_into_gradient(start, FULL * BLOCK + place, columns, label, peak, share, gain, True)
            for turn in range(FULL):
                column = (FULL - 1 - turn) * BLOCK + place
                turn_into_gradient(start, column, columns, label, peak, share, gain, False)


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
    found = exponential(value - tl.load(peaks + row)) / tl.load(totals + row) - tl.where(column == label, 1.0, 0.0)
    found = found * wide(tl.load(upstream))
    tl.store(gradient + row * columns + column, narrow(found, gradient.dtype.element_ty), mask=there)


def row_launch(columns: int, itemsize: int, *, in_place: bool) -> tuple[int, int, int]:
    """(Lanes, elements of each, threads) of a program that takes a row in turns.

    Written in place, a row of 256 KB (a vocabulary of 128,256 in bf16) gets 32 warps, and a multiprocessor holds one
    such program: 132 rows are 34 MB, and an H100's L2 has 50. A row half as long gets half the warps, so twice as many
    rows are in flight. What is read once gets few: while one program begins or ends a row, others load.
    """
    width = VECTOR // itemsize
    threads = 32 * min(power_of_two(columns * itemsize // ROW_BYTES), 32 if in_place else 8)
    return min(threads * LOADS, power_of_two(ceil_div(columns, width))), width, threads


def losses_of(matrix: Tensor, labels: Tensor, *, in_place: bool, gain: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """(Losses, largest logits, sums of exponentials) of the rows of ``matrix`` [n, vocabulary], [n] in fp32 or wider.

    ``in_place``: afterwards ``matrix`` holds ``gain`` times the gradient of the sum of the losses.
    """
    count, columns = matrix.shape
    losses = torch.empty(count, dtype=computed(matrix.dtype), device=matrix.device)
    peaks, totals = torch.empty_like(losses), torch.empty_like(losses)
    if count:
        lanes, width, threads = row_launch(columns, matrix.element_size(), in_place=in_place)
        with on_device_of(matrix):
            loss_kernel[(count,)](
                matrix, matrix.stride(0), labels, losses, peaks, totals, columns, gain, IN_PLACE=in_place,
                FULL=columns // (lanes * width), TAIL=columns % (lanes * width) > 0, LANES=lanes, WIDTH=width,
                num_warps=threads // 32,
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
