"""Rotary position embeddings of queries and keys in one launch, forward and backward.

Su et al. 2021 (RoFormer), pairs (i, i + d / 2). A program takes one token: it loads the angles once for all heads of
both. The backward is the transposed rotation of the gradients by the same kernel, so nothing is kept but the angles.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from camshaft.ops import Rope
from camshaft_kernels.devices import on_device_of
from camshaft_kernels.triton.launch import check, jit, narrow, power_of_two, warps, wide

ELEMENTS = 4096
"""Elements of half of a tile [heads, d / 2]: more heads are taken in turns."""


@jit
def turn_heads(
    source: tl.tensor, source_head: tl.tensor, target: tl.tensor,
    cos1: tl.tensor, cos2: tl.tensor, sin1: tl.tensor, sin2: tl.tensor,
    COUNT: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """All ``COUNT`` heads of one token, ``HEADS`` at a time."""
    column = tl.arange(0, BLOCK)[None, :]
    for start in range(0, COUNT, HEADS):
        head = (start + tl.arange(0, HEADS)[:, None]).to(tl.int64)
        there = (head < COUNT) & (column < HALF)
        first = source + head * source_head + column
        x1 = wide(tl.load(first, mask=there, other=0.0))
        x2 = wide(tl.load(first + HALF, mask=there, other=0.0))
        place = target + head * (HALF * 2) + column
        tl.store(place, narrow(x1 * cos1 + x2 * sin1, target.dtype.element_ty), mask=there)
        tl.store(place + HALF, narrow(x2 * cos2 + x1 * sin2, target.dtype.element_ty), mask=there)


@jit
def rope_kernel(
    q: tl.tensor, q_batch: tl.tensor, q_token: tl.tensor, q_head: tl.tensor, turned_q: tl.tensor,
    k: tl.tensor, k_batch: tl.tensor, k_token: tl.tensor, k_head: tl.tensor, turned_k: tl.tensor,
    cos: tl.tensor, cos_batch: tl.tensor, cos_token: tl.tensor,
    sin: tl.tensor, sin_batch: tl.tensor, sin_token: tl.tensor,
    tokens: tl.tensor,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr,
    HALF: tl.constexpr, BLOCK: tl.constexpr, TRANSPOSED: tl.constexpr,
) -> None:  # fmt: skip
    """One token: (x1, x2) to (x1 cos1 + x2 sin1, x2 cos2 + x1 sin2). ``TRANSPOSED`` exchanges the sines.

    ``HALF`` is compiled in: of a number that it does not know Triton sees whether it is a multiple of 16, and heads of
    80 are loaded in 16 bytes all the same.
    """
    place = tl.program_id(0).to(tl.int64)
    row, token = place // tokens, place % tokens
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < HALF
    cosines = cos + row * cos_batch + token * cos_token + column
    sines = sin + row * sin_batch + token * sin_token + column
    cos1 = wide(tl.load(cosines, mask=inside, other=0.0))
    cos2 = wide(tl.load(cosines + HALF, mask=inside, other=0.0))
    if TRANSPOSED:
        sin1 = wide(tl.load(sines + HALF, mask=inside, other=0.0))
        sin2 = wide(tl.load(sines, mask=inside, other=0.0))
    else:
        sin1 = wide(tl.load(sines, mask=inside, other=0.0))
        sin2 = wide(tl.load(sines + HALF, mask=inside, other=0.0))
    from_q, to_q = q + row * q_batch + token * q_token, turned_q + place * (QUERIES * HALF * 2)
    turn_heads(from_q, q_head, to_q, cos1, cos2, sin1, sin2, QUERIES, Q_HEADS, HALF, BLOCK)
    from_k, to_k = k + row * k_batch + token * k_token, turned_k + place * (KEYS * HALF * 2)
    turn_heads(from_k, k_head, to_k, cos1, cos2, sin1, sin2, KEYS, K_HEADS, HALF, BLOCK)


def _dense(tensor: Tensor) -> Tensor:
    """With the elements of a head side by side; any other distances. A copy only where they are not."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def heads_at_once(count: int, block: int) -> int:
    """How many heads of ``block`` pairs a tile has."""
    return min(power_of_two(count), max(ELEMENTS // block, 1))


def _turn(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_dtype: torch.dtype, k_dtype: torch.dtype, *, transposed: bool
) -> tuple[Tensor, Tensor]:
    """Both rotated, contiguous, in these dtypes."""
    check(q, k, cos, sin)
    turned_q = torch.empty(q.shape, dtype=q_dtype, device=q.device)
    turned_k = torch.empty(k.shape, dtype=k_dtype, device=k.device)
    batch, tokens, queries, width = q.shape
    if not (batch and tokens and width):
        return turned_q, turned_k
    q, k = _dense(q), _dense(k)
    cos, sin = _dense(cos).expand(batch, tokens, 1, width), _dense(sin).expand(batch, tokens, 1, width)
    half = width // 2
    block = power_of_two(half)
    at_once = heads_at_once(queries, block), heads_at_once(k.shape[2], block)
    with on_device_of(q):
        rope_kernel[(batch * tokens,)](
            q, q.stride(0), q.stride(1), q.stride(2), turned_q, k, k.stride(0), k.stride(1), k.stride(2), turned_k,
            cos, cos.stride(0), cos.stride(1), sin, sin.stride(0), sin.stride(1), tokens,
            QUERIES=queries, KEYS=k.shape[2], Q_HEADS=at_once[0], K_HEADS=at_once[1], HALF=half,
            BLOCK=block, TRANSPOSED=transposed, num_warps=warps(2 * at_once[0] * block),
        )  # fmt: skip
    return turned_q, turned_k


class _Rope(torch.autograd.Function):
    """``rope`` with its gradient."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.dtypes = q.dtype, k.dtype
        return _turn(q, k, cos, sin, dtype, dtype, transposed=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_q: Tensor, upstream_k: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        q, k = _turn(upstream_q, upstream_k, cos, sin, *ctx.dtypes, transposed=True)
        return q, k, None, None, None


def rope(q: Tensor, k: Tensor, angles: Rope, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """q [b, s, n, d] and k [b, s, m, d] rotated, in ``dtype``; the angles [b or 1, s or 1, 1, d] have no gradient.

    Any strides but that of the last dimension are honoured.

    Raises:
        MachineError: kernels cannot run here.
        ValueError: d is odd, the shapes do not fit each other, or the angles ask for a gradient.
    """
    cos, sin = angles
    if q.shape[-1] % 2 or q.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"rope takes heads of one even width on the same tokens, not {[*q.shape]} and {[*k.shape]}")
    if cos.shape != sin.shape or cos.shape[2:] != (1, q.shape[-1]):
        raise ValueError(f"rope takes angles [.., .., 1, {q.shape[-1]}], not {[*cos.shape]} and {[*sin.shape]}")
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("rope's kernel has no gradient for its angles: detach them, or use the provider 'torch'")
    turned_q, turned_k = _Rope.apply(q, k, cos, sin, dtype)  # type: ignore[no-untyped-call]
    return turned_q, turned_k
