"""What all kernels share: decoration, block sizes, views of tensors, and the refusal to run where they cannot.

Block sizes are chosen by hand from shape and device and not by trial, so that two runs make the same sums. A kernel
works on tiles [rows, columns] of tensors seen as matrices; offsets are 64-bit from the row on, so tensors may have more
than 2^31 elements. Every launch is inside of ``on_device_of`` one of its tensors.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

# What triton 3.10 changes its default of; unset, 3.9 warns when it compiles. Fused multiply-add rounds less.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
import triton.language as tl
from torch import Tensor

from camshaft.errors import MachineError
from camshaft_kernels.triton import available

jit: Callable[[Callable[..., Any]], Any] = triton.jit
"""``triton.jit``, which has no types of its own."""

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether kernels decorated from here on are interpreted."""

SOFTWARE = tl.constexpr(INTERPRETED)

VECTOR = 16
"""Bytes of the widest load and store of a thread, which addresses must be multiples of."""

LOG2_E = tl.constexpr(1.4426950408889634)

WIDEST = 65536
"""Columns of the widest row that one program holds."""


@jit
def wide(value: tl.tensor) -> tl.tensor:
    """The dtype that is computed in: fp32, or fp64 for fp64."""
    if value.dtype == tl.float64:
        return value
    else:  # noqa: RET505 (the compiler takes one branch by the dtype, and refuses a second return after it)
        return value.to(tl.float32)


@jit
def exponential(value: tl.tensor) -> tl.tensor:
    """e to the power of ``value``. In fp32 by the GPU's own 2^x, which takes what is below 2^-126 for 0: kept, those
    would cost three more instructions an element, a third of what a pass over logits computes.
    """
    if value.dtype == tl.float64:
        return tl.exp(value)
    else:  # noqa: RET505 (as above)
        return tl.exp2(value * LOG2_E)


@jit
def narrow(value: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """``value`` in ``dtype``, rounded to nearest even as GPUs do it; the interpreter cuts off what bf16 lacks."""
    if SOFTWARE and dtype == tl.bfloat16 and value.dtype == tl.float32:
        bits = value.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        value = tl.where(value == value, rounded, value)  # not a number stays so
    return value.to(dtype)


def computed(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype that statistics of such tensors are kept in: the widest, at least fp32."""
    found = torch.float32
    for dtype in dtypes:
        found = torch.promote_types(found, dtype)
    return found


def check(*tensors: Tensor) -> None:
    """Refuse tensors that no kernel here can reach, before a launch fails with a message about drivers.

    Raises:
        MachineError: they are not on a GPU, and kernels are not interpreted.
    """
    if not INTERPRETED and not all(tensor.is_cuda for tensor in tensors):
        devices = sorted({str(tensor.device) for tensor in tensors})
        reason = available(tensors[0].device) or "all tensors must be on the GPU"
        raise MachineError(f"a Triton kernel got tensors on {', '.join(devices)}, and {reason}")


def rows(tensor: Tensor) -> Tensor:
    """``tensor`` [..., columns] as a matrix with columns side by side.

    A view where there is one (any distance between rows); else, transposed or expanded, a copy, which costs less than
    reading single elements from all over memory in each pass.
    """
    matrix = tensor.reshape(-1, tensor.shape[-1]) if tensor.numel() else tensor.new_empty(0, tensor.shape[-1])
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] <= 1 else matrix.contiguous()


def power_of_two(number: int) -> int:
    """The smallest power of two that is not less than ``number``, at least 1."""
    return 1 << max(number - 1, 0).bit_length()


def ceil_div(whole: int, part: int) -> int:
    """How many parts cover the whole."""
    return -(-whole // part)


def tile(count: int, columns: int, elements: int) -> tuple[int, int]:
    """(rows, columns) of a program's tile, powers of two: whole rows, as many as come to ``elements``.

    Raises:
        ValueError: a row is too wide for one program.
    """
    if columns > WIDEST:
        raise ValueError(f"rows of {columns} elements are wider than the {WIDEST} that one program holds")
    block = power_of_two(columns)
    return min(max(elements // block, 1), power_of_two(count)), block


def warps(elements: int) -> int:
    """Warps of a program with tiles of so many elements: 32 of them to a thread, which stay in registers."""
    return min(max(power_of_two(elements // 1024), 1), 16)


def processors(device: torch.device) -> int:
    """How many multiprocessors a GPU has; few in the interpreter, where programs run one after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
