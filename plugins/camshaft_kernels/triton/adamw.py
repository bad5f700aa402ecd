"""AdamW over a list of tensors in one launch: a factor on gradients, such as clipping's, decay, moments and step in one
pass over memory. The plugin `precision` divides out a loss scale before, when it looks for overflow.

Loshchilov and Hutter 2019, as ``torch.optim.AdamW`` orders it: p (1 - lr wd) - lr m' / (sqrt(v') + eps), with moments m
and v of gradients times ``scale`` and m', v' free of their bias towards zero. Bias corrections are computed in fp64 on
the host; the arithmetic is fp32, and a bf16 parameter is rounded once. Read and written: 28 bytes an element with fp32
throughout, 22 with bf16 parameters and gradients.

A launch takes a table of addresses instead of tensors, so its cost does not grow with their number. Tables are kept
while addresses stay the same, which they do from step to step. An update of an element does not depend on what tensor
or flat buffer it lies in.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from camshaft_kernels.devices import on_device_of
from camshaft_kernels.triton.launch import INTERPRETED, VECTOR, check, jit, narrow

CHUNK = 1 << 14
"""Elements of a program."""

WARPS = 4

LOADS = 2
"""Loads of 16 bytes, or of 8 where dtypes are mixed, for each thread and tensor at a time."""

TABLES = 64
"""Tables that are kept: one for each group of parameters, dtype and alignment."""

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@jit
def update_tile(
    parameter: tl.tensor, gradient: tl.tensor, first: tl.tensor, second: tl.tensor, count: tl.tensor,
    factor: tl.tensor, keep1: tl.tensor, keep2: tl.tensor, add1: tl.tensor, add2: tl.tensor,
    rate: tl.tensor, widen2: tl.tensor, eps: tl.tensor, decay: tl.tensor,
    MASKED: tl.constexpr, ELEMENTS: tl.constexpr, CHUNK: tl.constexpr,
) -> None:  # fmt: skip
    """A chunk of one tensor. Only the last of a tensor is masked: unknown sizes would keep others from wide loads."""
    for turn in range(CHUNK // ELEMENTS):
        place = turn * ELEMENTS + tl.arange(0, ELEMENTS)
        there = place < count if MASKED else None
        g = tl.load(gradient + place, mask=there).to(tl.float32) * factor
        m = tl.load(first + place, mask=there).to(tl.float32)
        v = tl.load(second + place, mask=there).to(tl.float32)
        p = tl.load(parameter + place, mask=there).to(tl.float32)
        m = m * keep1 + g * add1
        v = v * keep2 + g * g * add2
        p = p * decay - rate * (m / (tl.sqrt(v) * widen2 + eps))
        tl.store(first + place, narrow(m, first.dtype.element_ty), mask=there)
        tl.store(second + place, narrow(v, second.dtype.element_ty), mask=there)
        tl.store(parameter + place, narrow(p, parameter.dtype.element_ty), mask=there)


@jit
def adamw_kernel(
    table: tl.tensor, owners: tl.tensor, scale: tl.tensor,
    keep1: tl.tensor, keep2: tl.tensor, add1: tl.tensor, add2: tl.tensor,
    rate: tl.tensor, widen2: tl.tensor, eps: tl.tensor, decay: tl.tensor,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, V: tl.constexpr,
    SCALED: tl.constexpr, ALIGNED: tl.constexpr, ELEMENTS: tl.constexpr, CHUNK: tl.constexpr,
) -> None:  # fmt: skip
    """One chunk. ``table`` has a row of six a tensor: four addresses, elements, and its first program."""
    entry = table + tl.load(owners + tl.program_id(0)).to(tl.int64) * 6
    start = (tl.program_id(0) - tl.load(entry + 5)).to(tl.int64) * CHUNK
    parameter = tl.load(entry).to(tl.pointer_type(P)) + start
    gradient = tl.load(entry + 1).to(tl.pointer_type(G)) + start
    first = tl.load(entry + 2).to(tl.pointer_type(M)) + start
    second = tl.load(entry + 3).to(tl.pointer_type(V)) + start
    if ALIGNED:
        parameter, gradient = tl.multiple_of(parameter, 16), tl.multiple_of(gradient, 16)
        first, second = tl.multiple_of(first, 16), tl.multiple_of(second, 16)
    count = tl.load(entry + 4) - start
    factor = 1.0
    if SCALED:
        factor = tl.load(scale).to(tl.float32)
    if count >= CHUNK:
        update_tile(
            parameter, gradient, first, second, count, factor, keep1, keep2, add1, add2, rate, widen2, eps, decay,
            False, ELEMENTS, CHUNK,
        )  # fmt: skip
    else:
        update_tile(
            parameter, gradient, first, second, count, factor, keep1, keep2, add1, add2, rate, widen2, eps, decay,
            True, ELEMENTS, CHUNK,
        )  # fmt: skip


@dataclass(frozen=True)
class _Table:
    """What a launch needs of its tensors, on their device."""

    rows: Tensor
    """int64 [tensors, 6]: see ``adamw_kernel``."""
    owners: Tensor
    """int32 [programs]: the tensor of each."""
    aligned: bool


_tables: OrderedDict[tuple[object, ...], _Table] = OrderedDict()


def _table(tensors: Sequence[tuple[Tensor, ...]]) -> _Table:
    """The table of (parameter, gradient, first, second) for all, from those that are kept, or made."""
    key = (tensors[0][0].device, *(tensor.data_ptr() for four in tensors for tensor in four), *map(_elements, tensors))
    found = _tables.pop(key, None) or _make_table(tensors)
    _tables[key] = found
    while len(_tables) > TABLES:
        _tables.popitem(last=False)
    return found


def _elements(four: tuple[Tensor, ...]) -> int:
    return four[0].numel()


def _make_table(tensors: Sequence[tuple[Tensor, ...]]) -> _Table:
    """One copy to the device each, from pinned memory, so that the host need not wait."""
    addresses = torch.tensor([[tensor.data_ptr() for tensor in four] for four in tensors], dtype=torch.int64)
    counts = torch.tensor([_elements(four) for four in tensors], dtype=torch.int64)
    programs = (counts + CHUNK - 1) // CHUNK
    starts = programs.cumsum(0) - programs
    rows = torch.cat((addresses, counts[:, None], starts[:, None]), 1)
    owners = torch.arange(len(tensors), dtype=torch.int32).repeat_interleave(programs)
    device = tensors[0][0].device
    aligned = bool((addresses % VECTOR == 0).all())
    return _Table(_moved(rows, device), _moved(owners, device), aligned)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _groups(lists: Iterable[tuple[Tensor, ...]]) -> list[list[tuple[Tensor, ...]]]:
    """Tensors of one device and the same dtypes, and with wide loads or without, together; empty ones left out."""
    found: dict[tuple[object, ...], list[tuple[Tensor, ...]]] = {}
    for four in lists:
        if four[0].numel():
            aligned = all(tensor.data_ptr() % VECTOR == 0 for tensor in four)
            found.setdefault((four[0].device, aligned, *(tensor.dtype for tensor in four)), []).append(four)
    return list(found.values())


def _checked(four: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """All as long as the first, of a dtype that is computed in fp32.

    Raises:
        ValueError: sizes differ.
        TypeError: a dtype is wider.
    """
    check(*four)
    if len({tensor.shape for tensor in four}) > 1:
        raise ValueError(f"adamw: parameter, gradient and moments differ in shape: {[[*t.shape] for t in four]}")
    unknown = [str(tensor.dtype) for tensor in four if tensor.dtype not in DTYPES]
    if unknown:
        raise TypeError(f"adamw's kernel computes in fp32 and does not take {', '.join(unknown)}")
    return four


def elements(dtypes: Iterable[torch.dtype]) -> int:
    """Elements that a program loads at a time. So many for each thread that all tensors lie alike in registers: with
    16 bytes of a narrow dtype beside 16 of a wide one, Triton would exchange them through shared memory in each turn.
    """
    if INTERPRETED:
        return CHUNK
    sizes = {dtype.itemsize for dtype in dtypes}
    return WARPS * 32 * (VECTOR // max(sizes)) * (LOADS if len(sizes) == 1 else 1)


def _launch(tensors: list[tuple[Tensor, ...]], scale: Tensor | None, scalars: tuple[float, ...]) -> None:
    """One group."""
    table = _table(tensors)
    dtypes = [DTYPES[tensor.dtype] for tensor in tensors[0]]
    device = tensors[0][0].device
    with on_device_of(table.rows):
        adamw_kernel[(table.owners.numel(),)](
            table.rows, table.owners, table.rows if scale is None else scale.to(device), *scalars, *dtypes,
            SCALED=scale is not None, ALIGNED=table.aligned, CHUNK=CHUNK,
            ELEMENTS=elements(tensor.dtype for tensor in tensors[0]), num_warps=WARPS,
        )  # fmt: skip


@torch.no_grad()
def adamw(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    scale: Tensor | None = None,
) -> None:
    """Update parameters and both moments in place, one launch for each device and combination of dtypes.

    Tensors of one place in the lists have one shape; fp32, bf16 or fp16 each (moments belong in fp32). ``step`` counts
    from 1. Gradients are multiplied by ``scale``, a scalar tensor, on the way and stay as they are. A tensor that is
    not contiguous is updated in a copy.

    Raises:
        MachineError: kernels cannot run here.
        TypeError: a dtype is none of those.
        ValueError: lists or shapes do not fit each other.
    """
    given = [_checked(four) for four in zip(parameters, gradients, first, second, strict=True)]
    dense = [tuple(tensor.contiguous() for tensor in four) for four in given]
    beta1, beta2 = betas
    widen2 = 1 / math.sqrt(1 - beta2**step)
    rate = float(lr) / (1 - beta1**step)
    scalars = (beta1, beta2, 1 - beta1, 1 - beta2, rate, widen2, eps, 1 - float(lr) * weight_decay)
    for group in _groups(dense):
        _launch(group, scale, scalars)
    for four, made in zip(given, dense, strict=True):
        for index in (0, 2, 3):
            if made[index] is not four[index]:
                four[index].copy_(made[index])
    torch.autograd.graph.increment_version(list(parameters))
