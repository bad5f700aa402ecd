"""RMSNorm, alone and of a sum with a residual, each one pass over memory forward and one backward.

Zhang and Sennrich 2019. Statistics are in fp32 (fp64 of fp64). The weight's gradient is summed by a fixed number of
programs, each over its own rows, into one row of partial sums each, which a second kernel adds: no atomics, so two runs
give the same bits. What is kept for the backward is the input (or the sum), the weight and one number a row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from camshaft_kernels.devices import on_device_of
from camshaft_kernels.triton.launch import ceil_div, check, computed, jit, narrow, processors, rows, tile, warps, wide

ELEMENTS = 4096
"""Elements of a tile: enough loads in flight for the memory's latency, few enough to stay in registers."""

TILE_BYTES = 8192
"""Bytes of the input's tile in the backward."""

THREAD_BYTES = 32
"""Of which so many belong to each thread: two loads, and those of the next tile."""

WARPS = 16
"""Warps of the backward on each multiprocessor, whose registers hold so many with 128 a thread: more programs would
wait for the first ones and add rows of partial sums.
"""

PARTIAL_TILE = (128, 32)
"""Rows and columns of partial sums that a program adds at a time; small, so that there are programs for a whole GPU."""


@jit
def forward_kernel(
    hidden: tl.tensor, hidden_stride: tl.tensor,
    residual: tl.tensor, residual_stride: tl.tensor,
    weight: tl.tensor, summed: tl.tensor, normed: tl.tensor, scales: tl.tensor,
    count: tl.tensor, columns: tl.tensor, eps: tl.tensor,
    ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of whole rows: the sum (with ``ADD``), 1 / root mean square of each row, and the norm."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    there = (row < count) & (column < columns)
    value = tl.load(hidden + row * hidden_stride + column, mask=there, other=0.0)
    if ADD:
        other = tl.load(residual + row * residual_stride + column, mask=there, other=0.0)
        value = narrow(wide(value) + wide(other), summed.dtype.element_ty)
        tl.store(summed + row * columns + column, value, mask=there)
    value = value.to(scales.dtype.element_ty)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 1)[:, None] / columns + eps)
    tl.store(scales + row, scale, mask=row < count)
    gain = wide(tl.load(weight + column, mask=column < columns, other=0.0))
    tl.store(normed + row * columns + column, narrow(value * scale * gain, normed.dtype.element_ty), mask=there)


@jit
def backward_kernel(
    upstream: tl.tensor, upstream_stride: tl.tensor,
    extra: tl.tensor, extra_stride: tl.tensor,
    value: tl.tensor, value_stride: tl.tensor,
    weight: tl.tensor, scales: tl.tensor, gradient: tl.tensor, partial: tl.tensor,
    count: tl.tensor, columns: tl.tensor, tiles: tl.tensor,
    EXTRA: tl.constexpr, PARTIAL: tl.constexpr, AHEAD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """``tiles`` tiles, one after another: the input's gradient (plus ``extra``), and this program's sum for the weight.

    With x' = x / rms and g = gradient * weight: dx = (g - x' * mean(g * x')) / rms, and dw is the sum over rows
    of gradient * x'. ``AHEAD``: registers hold the weight, and the next tile, loaded while this one is summed.
    """
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < columns
    gain = wide(tl.load(weight + column, mask=inside, other=0.0))
    row = tl.program_id(0).to(tl.int64) * tiles * ROWS + tl.arange(0, ROWS)[:, None]
    end = tl.minimum((tl.program_id(0).to(tl.int64) + 1) * tiles * ROWS, count)
    total = tl.zeros((ROWS, BLOCK), dtype=partial.dtype.element_ty)
    if AHEAD:
        values = tl.load(value + row * value_stride + column, mask=(row < end) & inside, other=0.0)
        upstreams = tl.load(upstream + row * upstream_stride + column, mask=(row < end) & inside, other=0.0)
    turn = 0
    while turn < tiles:  # not range: the interpreter of triton 3.6 has none of a number that comes at run time
        there = (row < end) & inside
        scale = tl.load(scales + row, mask=row < end, other=0.0)
        if not AHEAD:
            values = tl.load(value + row * value_stride + column, mask=there, other=0.0)
            upstreams = tl.load(upstream + row * upstream_stride + column, mask=there, other=0.0)
        unit, into = wide(values) * scale, wide(upstreams)
        later = row + ROWS
        if AHEAD:
            if EXTRA:
                more = tl.load(extra + row * extra_stride + column, mask=there, other=0.0)
            values = tl.load(value + later * value_stride + column, mask=(later < end) & inside, other=0.0)
            upstreams = tl.load(upstream + later * upstream_stride + column, mask=(later < end) & inside, other=0.0)
        if PARTIAL:
            total += into * unit
        if not AHEAD:
            gain = wide(tl.load(weight + column, mask=inside, other=0.0))
        into = into * gain
        found = (into - unit * (tl.sum(into * unit, 1)[:, None] / columns)) * scale
        if EXTRA:
            if not AHEAD:
                more = tl.load(extra + row * extra_stride + column, mask=there, other=0.0)
            found += wide(more)
        tl.store(gradient + row * columns + column, narrow(found, gradient.dtype.element_ty), mask=there)
        row = later
        turn += 1
    if PARTIAL:
        place = partial + tl.program_id(0) * columns + column
        tl.store(place, tl.sum(total, 0)[None, :], mask=inside)


@jit
def weight_kernel(
    partial: tl.tensor, made: tl.tensor, programs: tl.tensor, columns: tl.tensor,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """The weight's gradient: a block of columns of the programs' partial sums, added up and rounded once."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    row = tl.arange(0, ROWS)[:, None]
    total = tl.zeros((ROWS, BLOCK), dtype=partial.dtype.element_ty)
    while tl.min(tl.min(row, 0), 0) < programs:
        there = (row < programs) & (column < columns)
        total += tl.load(partial + row * columns + column, mask=there, other=0.0)
        row += ROWS
    tl.store(made + column, narrow(tl.sum(total, 0)[None, :], made.dtype.element_ty), mask=column < columns)


def _forward(
    hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(norm, sum or None, the matrix that was normed, 1 / rms of each row)."""
    check(hidden, weight, *(() if residual is None else (residual,)))
    if weight.shape != hidden.shape[-1:] or (residual is not None and residual.shape != hidden.shape):
        shapes = ", ".join(str([*each.shape]) for each in (hidden, residual, weight) if each is not None)
        raise ValueError(f"a norm takes [..., h], its residual of the same shape and a weight [h], not {shapes}")
    matrix, columns = rows(hidden), hidden.shape[-1]
    other = matrix if residual is None else rows(residual)
    dtype = torch.promote_types(matrix.dtype, other.dtype)
    summed = None if residual is None else torch.empty(hidden.shape, dtype=dtype, device=hidden.device)
    normed = torch.empty(hidden.shape, dtype=torch.promote_types(dtype, weight.dtype), device=hidden.device)
    count = matrix.shape[0]
    scales = torch.empty(count, dtype=computed(dtype, weight.dtype), device=hidden.device)
    if count and columns:
        tall, block = tile(count, columns, ELEMENTS)
        with on_device_of(matrix):
            forward_kernel[(ceil_div(count, tall),)](
                matrix, matrix.stride(0), other, other.stride(0), weight.contiguous(),
                matrix if summed is None else summed, normed, scales, count, columns, eps,
                ADD=summed is not None, ROWS=tall, BLOCK=block, num_warps=warps(tall * block),
            )  # fmt: skip
    return normed, summed, matrix if summed is None else summed.view(-1, columns), scales


def _backward(
    upstream: Tensor, extra: Tensor | None, value: Tensor, weight: Tensor, scales: Tensor, *, weighted: bool
) -> tuple[Tensor, Tensor | None]:
    """(Gradient of the normed matrix, the weight's or None): ``extra`` is what comes to the matrix besides the norm."""
    count, columns = value.shape
    upstream = rows(upstream)
    other = upstream if extra is None else rows(extra)
    gradient = torch.empty_like(value, memory_format=torch.contiguous_format)
    tall, block, of_program, ahead = backward_launch(count, columns, max(upstream.element_size(), value.element_size()))
    tiles = ceil_div(ceil_div(count, tall), ceil_div(WARPS, of_program) * processors(value.device))
    programs = ceil_div(ceil_div(count, tall), tiles) if tiles else 0
    partial = torch.empty((programs, columns) if weighted else (1, 1), dtype=scales.dtype, device=value.device)
    made = torch.empty_like(weight, memory_format=torch.contiguous_format) if weighted else None
    if programs and columns:
        with on_device_of(partial):
            backward_kernel[(programs,)](
                upstream, upstream.stride(0), other, other.stride(0), value, value.stride(0), weight.contiguous(),
                scales, gradient, partial, count, columns, tiles,
                EXTRA=extra is not None, PARTIAL=weighted, AHEAD=ahead, ROWS=tall, BLOCK=block, num_warps=of_program,
            )  # fmt: skip
            if made is not None:
                weight_kernel[(ceil_div(columns, PARTIAL_TILE[1]),)](
                    partial, made, programs, columns, ROWS=PARTIAL_TILE[0], BLOCK=PARTIAL_TILE[1], num_warps=4
                )
    elif made is not None:
        made.zero_()
    return gradient, made


def backward_launch(count: int, columns: int, itemsize: int) -> tuple[int, int, int, bool]:
    """(Rows, columns, warps of the backward's tile, whether registers hold the next tile too)."""
    tall, block = tile(count, columns, TILE_BYTES // itemsize)
    wanted = max(tall * block * itemsize // THREAD_BYTES // 32, 1)
    return tall, block, min(wanted, WARPS), wanted <= WARPS


class _RMSNorm(torch.autograd.Function):
    """``rms_norm`` with its gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed, _, value, scales = _forward(hidden, None, weight, eps)
        ctx.save_for_backward(value, weight, scales)
        ctx.shape = hidden.shape
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        value, weight, scales = ctx.saved_tensors
        gradient, weights = _backward(upstream, None, value, weight, scales, weighted=ctx.needs_input_grad[1])
        return gradient.view(ctx.shape), weights, None


class _AddRMSNorm(torch.autograd.Function):
    """``add_rms_norm`` with its gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        normed, summed, _, scales = _forward(hidden, residual, weight, eps)
        assert summed is not None
        ctx.save_for_backward(summed, weight, scales)
        ctx.set_materialize_grads(False)
        ctx.dtypes = hidden.dtype, residual.dtype
        return normed, summed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, extra: Tensor | None) -> tuple[Tensor | None, ...]:
        summed, weight, scales = ctx.saved_tensors
        gradient, weights = extra, None
        if upstream is not None:
            value, weighted = summed.view(-1, summed.shape[-1]), ctx.needs_input_grad[2]
            flat, weights = _backward(upstream, extra, value, weight, scales, weighted=weighted)
            gradient = flat.view(summed.shape)
        if gradient is None:
            return None, None, None, None
        return gradient.to(ctx.dtypes[0]), gradient.to(ctx.dtypes[1]), weights, None


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., h] normalised and times ``weight`` [h], in the wider of both dtypes. Any distance between rows.

    Raises:
        MachineError: kernels cannot run here.
        ValueError: h is more than 65,536, or the shapes do not fit each other.
    """
    normed: Tensor = _RMSNorm.apply(hidden, weight, eps)  # type: ignore[no-untyped-call]
    return normed


def add_rms_norm(hidden: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(``rms_norm`` of the sum, the sum) of ``residual + hidden``, both [..., h] of one shape.

    The sum is in the wider of both dtypes, and the norm is of the sum as it was rounded. Raises as ``rms_norm``.
    """
    normed, summed = _AddRMSNorm.apply(hidden, residual, weight, eps)  # type: ignore[no-untyped-call]
    return normed, summed
