"""silu(gate) * up in one pass; the backward computes silu again, so nothing is kept but its two inputs.

Shazeer 2020. In fp32 (fp64 of fp64), rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from camshaft_kernels.devices import on_device_of
from camshaft_kernels.triton.launch import ceil_div, check, exponential, jit, narrow, power_of_two, rows, warps, wide

ELEMENTS = 2048
"""Elements of a program: two loads of 16 bytes for each thread and input."""


@jit
def forward_kernel(
    gate: tl.tensor, gate_stride: tl.tensor, up: tl.tensor, up_stride: tl.tensor, out: tl.tensor,
    columns: tl.tensor, blocks: tl.tensor, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """One block of one row of ``blocks`` blocks."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = column < columns
    g = wide(tl.load(gate + row * gate_stride + column, mask=there, other=0.0))
    u = wide(tl.load(up + row * up_stride + column, mask=there, other=0.0))
    made = g / (1.0 + exponential(-g)) * u
    tl.store(out + row * columns + column, narrow(made, out.dtype.element_ty), mask=there)


@jit
def backward_kernel(
    upstream: tl.tensor, upstream_stride: tl.tensor, gate: tl.tensor, gate_stride: tl.tensor,
    up: tl.tensor, up_stride: tl.tensor, into_gate: tl.tensor, into_up: tl.tensor,
    columns: tl.tensor, blocks: tl.tensor, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Both gradients of one block; d silu(g) / dg = s (1 + g (1 - s)) with s = sigmoid(g)."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = column < columns
    into = wide(tl.load(upstream + row * upstream_stride + column, mask=there, other=0.0))
    g = wide(tl.load(gate + row * gate_stride + column, mask=there, other=0.0))
    u = wide(tl.load(up + row * up_stride + column, mask=there, other=0.0))
    s = 1.0 / (1.0 + exponential(-g))
    place = row * columns + column
    tl.store(into_up + place, narrow(into * (g * s), into_up.dtype.element_ty), mask=there)
    tl.store(into_gate + place, narrow(into * u * (s * (1.0 + g * (1.0 - s))), into_gate.dtype.element_ty), mask=there)


def _matrices(*tensors: Tensor) -> list[Tensor]:
    """As matrices with columns side by side; as one long row each where all are contiguous."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return [tensor.view(1, -1) for tensor in tensors]
    return [rows(tensor) for tensor in tensors]


def _grid(matrix: Tensor) -> tuple[int, int, int]:
    """(programs, blocks of a row, elements of a block)."""
    block = min(power_of_two(matrix.shape[1]), ELEMENTS)
    blocks = ceil_div(matrix.shape[1], block)
    return matrix.shape[0] * blocks, blocks, block


class _SwiGLU(torch.autograd.Function):
    """``swiglu`` with its gradient."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        out = torch.empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype), device=gate.device)
        if out.numel():
            g, u = _matrices(gate, up)
            programs, blocks, block = _grid(g)
            with on_device_of(g):
                forward_kernel[(programs,)](
                    g, g.stride(0), u, u.stride(0), out, g.shape[1], blocks, BLOCK=block, num_warps=warps(2 * block)
                )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        into_gate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        into_up = torch.empty(up.shape, dtype=up.dtype, device=up.device)
        if upstream.numel():
            d, g, u = _matrices(upstream, gate, up)
            programs, blocks, block = _grid(g)
            with on_device_of(g):
                backward_kernel[(programs,)](
                    d, d.stride(0), g, g.stride(0), u, u.stride(0), into_gate, into_up, g.shape[1], blocks,
                    BLOCK=block, num_warps=warps(2 * block),
                )  # fmt: skip
        return into_gate, into_up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of one shape [..., h], in the wider of both dtypes. Any distance between rows.

    Raises:
        MachineError: kernels cannot run here.
        ValueError: the shapes differ.
    """
    if gate.shape != up.shape:
        raise ValueError(f"swiglu takes two tensors of one shape, not {[*gate.shape]} and {[*up.shape]}")
    check(gate, up)
    out: Tensor = _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]
    return out
