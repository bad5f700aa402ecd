"""Numbers in 8 bits: how a tensor is scaled and rounded, and products of two such tensors.

Formats are those of Micikevicius et al. (arXiv:2209.05433): e4m3 (largest 448) and e5m2 (largest 57,344). A scale
brings the largest magnitude near the format's own largest. It is rounded down to a power of two, so that scaling
itself rounds nothing, and what divides a tensor over ranks changes no value but those that underflow. Amax and scales
are fp32. What is not finite comes out as NaN; finite values that are too large for an old scale saturate.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
LEAST = 2.0**-100
"""Amax of a tensor of zeros, so that its scale and the inverse of it are ordinary fp32 numbers."""

_CPU_KERNEL = torch.__version__ >= "2.13"
"""Whether ``torch._scaled_mm`` runs on a CPU, where tests alone use it."""


class Rounded(NamedTuple):
    """``values`` [r, c] in 8 bits, times ``inverse``, a scalar or [r, 1] in fp32, is the tensor."""

    values: Tensor
    inverse: Tensor


def amax(tensor: Tensor, *, rowwise: bool) -> Tensor:
    """Largest magnitude in fp32: a scalar, or [r, 1] of each row. NaN where one is."""
    return (tensor.abs().amax(-1, keepdim=True) if rowwise else tensor.abs().amax()).float()


def scale_of(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """The power of two that ``dtype`` holds the most of, of a tensor whose amax is ``largest``; NaN of NaN and inf."""
    ratio = LARGEST[dtype] / largest.clamp_min(LEAST)
    power = (ratio.view(torch.int32) & 0x7F800000).view(torch.float32)  # the exponent alone
    return torch.where(largest.isfinite(), power, torch.nan)


def round_to(tensor: Tensor, dtype: torch.dtype, scale: Tensor) -> Rounded:
    """``tensor`` [r, c] times ``scale`` in ``dtype``, to nearest, saturated."""
    wide = tensor.float() * scale
    largest = LARGEST[dtype]
    values = torch.where(wide.isfinite(), wide.clamp(-largest, largest), torch.nan)
    return Rounded(values.to(dtype), scale.reciprocal())


def quantise(tensor: Tensor, dtype: torch.dtype, *, rowwise: bool) -> Rounded:
    """``tensor`` [r, c] in ``dtype`` with the scale that it has now, of all of it or of each row."""
    return round_to(tensor, dtype, scale_of(amax(tensor, rowwise=rowwise), dtype))


def product(left: Rounded, right: Rounded, *, fast: bool) -> Tensor:
    """``left`` [m, k] times the transpose of ``right`` [n, k], [m, n] in bf16.

    Both are scaled as a whole or both by rows. ``fast``: tensor cores may accumulate in fewer bits than fp32.
    """
    a, b = left.values.contiguous(), right.values.contiguous()  # whatever strides the model has given them
    if a.device.type == "cpu" and not _CPU_KERNEL:
        with torch.autocast("cpu", enabled=False):
            return (a.float().mul(left.inverse) @ b.float().mul(right.inverse).t()).to(torch.bfloat16)
    inverse = right.inverse.t() if right.inverse.ndim == 2 else right.inverse
    # Its public successor, F.scaled_mm, cannot be part of a compiled graph in torch 2.11. torchao calls this one too.
    made: Tensor = torch._scaled_mm(a, b.t(), left.inverse, inverse, out_dtype=torch.bfloat16, use_fast_accum=fast)
    return made
