"""First values of parameters: a function of (seed, name, place in the tensor), and of nothing else.

A parameter is flattened and cut into blocks of 16,384 values. The stream of a block is Philox (Salmon et al. 2011)
with a 128-bit BLAKE2b hash of (seed, name) as its key and the block's number in its counter, so that any slice is made
without the rest, on any rank, in any order and for any layout. Values are drawn as fp32 on the CPU and then cast: an
fp64 and a bf16 model start from the same numbers. NumPy's generator is used because torch's takes only 32 bits of a
seed (blocks of a large model would repeat), and its normal numbers differ between CPUs with and without AVX.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from camshaft.models.roles import Initial, Owned, initial_values, owned_parameters

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.placement_types import Placement

    from camshaft.parts import Box

BLOCK = 16_384
"""Values of a block. Below the size from which torch spreads a copy over threads, which costs more than it saves."""


class _Shard(NamedTuple):
    """Storage of a rectangular part of a parameter, the shape of the whole, and where in it the part begins."""

    target: Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]


class _Stream:
    """Normal numbers of one parameter; keeps the last block, which the next row of a shard often needs again."""

    def __init__(self, name: str, std: float, seed: int) -> None:
        digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=16).digest()
        self._key = int.from_bytes(digest, "little")
        self._std = np.float32(std)
        self._index, self._block = -1, np.empty(0, np.float32)

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """(place, values) covering [start, stop) of the flattened parameter, cut at the blocks' borders."""
        while start < stop:
            index, first = divmod(start, BLOCK)
            last = min(BLOCK, first + stop - start)
            yield start, self._values(index)[first:last]
            start += last - first

    def _values(self, index: int) -> npt.NDArray[np.float32]:
        if index != self._index:
            # Word 2 of the 256-bit counter is the block; a block draws far fewer than the 2**128 numbers below it.
            bits = np.random.Philox(key=self._key, counter=index << 128)
            # A whole block always: its values may not depend on where the parameter ends.
            self._block = np.random.Generator(bits).standard_normal(BLOCK, dtype=np.float32)
            self._block *= self._std
            self._index = index
        return self._block


def values(name: str, initial: Initial, *, seed: int, start: int, stop: int) -> Tensor:
    """Values [start, stop) of the flattened parameter ``name``: fp32, on the CPU."""
    out = torch.empty(stop - start, dtype=torch.float32, device="cpu")
    fill(out, name, initial, seed=seed, shape=(stop,), offset=(start,))
    return out


@torch.no_grad()
def fill(
    target: Tensor,
    name: str,
    initial: Initial,
    *,
    seed: int,
    shape: Sequence[int] | None = None,
    offset: Sequence[int] | None = None,
) -> None:
    """Write the first values of a parameter, or of one rectangular shard of it, into ``target``.

    Needs one block of memory besides the target.

    Args:
        target: contiguous, any dtype and device.
        name: the parameter's first name.
        initial: the distribution.
        seed: the run's.
        shape: of the whole parameter; without it ``target`` is the whole.
        offset: index in the whole of the target's first element, one number a dimension.
    """
    if initial.std == 0.0:
        target.fill_(initial.constant)
        return
    local = tuple(target.shape)
    whole = local if shape is None else tuple(shape)
    runs = _runs(local, whole, (0,) * len(whole) if offset is None else tuple(offset))
    _draw(target.view(-1), runs, _Stream(name, initial.std, seed))


@torch.no_grad()
def fill_stretch(
    target: Tensor, name: str, initial: Initial, *, seed: int, shape: Sequence[int], start: int, box: Box | None
) -> None:
    """Write first values ``start`` to ``start + target.numel()`` of a flattened shard [``shape``] into ``target``.

    ``box`` tells where in the whole parameter the shard lies; None: it is the whole. Needs one block of memory.
    """
    if initial.std == 0.0:
        target.fill_(initial.constant)
        return
    local, stop = tuple(shape), start + target.numel()
    whole, offset = (local, (0,) * len(local)) if box is None else (box.shape, box.offset)
    _draw(target.view(-1), _between(_runs(local, whole, offset, start), start, stop), _Stream(name, initial.std, seed))


def _draw(flat: Tensor, runs: Iterator[tuple[int, int, int]], stream: _Stream) -> None:
    for place, begin, length in runs:
        for at, piece in stream.pieces(begin, begin + length):
            here = place + at - begin
            flat[here : here + len(piece)].copy_(torch.from_numpy(piece))


def _between(runs: Iterator[tuple[int, int, int]], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """What of ``runs`` lies between two places of the shard; places then count from ``start``."""
    for place, begin, length in runs:
        if place >= stop:
            return
        skipped = max(start - place, 0)
        yield place + skipped - start, begin + skipped, min(length, stop - place) - skipped


def _runs(
    local: tuple[int, ...], whole: tuple[int, ...], offset: tuple[int, ...], start: int = 0
) -> Iterator[tuple[int, int, int]]:
    """(place in the shard, place in the whole, length) of each stretch that is contiguous in both, in order.

    Those that end before place ``start`` of the shard are left out.
    """
    if not len(local) == len(whole) == len(offset):
        raise ValueError(f"shard {local} at {offset} does not have the dimensions of {whole}")
    if any(at < 0 or at + size > total for size, total, at in zip(local, whole, offset, strict=True)):
        raise ValueError(f"shard {local} at {offset} does not lie in {whole}")
    if not prod(local):
        return
    cut = len(local)  # dimensions from `cut` on are complete
    while cut and local[cut - 1] == whole[cut - 1]:
        cut -= 1
    outer = max(cut - 1, 0)
    strides = [prod(whole[dim + 1 :]) for dim in range(len(whole))]
    base = sum(at * stride for at, stride in zip(offset, strides, strict=True))
    length = prod(local[outer:])
    for number in range(start // length, prod(local[:outer])):
        begin, rest = base, number
        for size, stride in zip(reversed(local[:outer]), reversed(strides[:outer]), strict=True):
            rest, at = divmod(rest, size)
            begin += at * stride
        yield number * length, begin, length


@torch.no_grad()
def materialize(
    model: nn.Module,
    *,
    seed: int,
    device: torch.device | str,
    dtype: torch.dtype,
    only: Container[str] | None = None,
    boxes: Mapping[str, Box] | None = None,
) -> None:
    """Give every parameter (of the names in ``only``) and buffer its storage on ``device`` and first values, in place.

    A parameter of ``boxes`` gets that rectangle of the whole one's values, and a DTensor its local shard; together they
    hold what one process would have.

    Parameters stay the same Python objects: ties, ``requires_grad``, attributes and references that plugins hold
    remain. Modules with buffers compute them in their ``reset_buffers(device)``; buffers that are not on meta are
    moved. Works on ``torch.get_num_threads()`` parameters at a time; each needs one block besides itself.

    Raises:
        ValueError: a parameter carries hooks or weak references from before it had storage, or a meta buffer has nobody
            to compute it.
    """
    device = torch.device(device)
    owned = [each for each in owned_parameters(model) if only is None or each.name in only]
    for parameter in owned:
        _refuse_hooks(parameter)
    # Storage is taken here, because the current GPU belongs to a thread; drawing numbers releases the GIL.
    shards = [_shard(each.parameter, device, dtype, (boxes or {}).get(each.name)) for each in owned]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(partial(_fill_shard, seed), owned, shards))
    for each, shard in zip(owned, shards, strict=True):
        _adopt(each, shard)
    for prefix, module in model.named_modules():
        _materialize_buffers(prefix, module, device)


def _refuse_hooks(owned: Owned) -> None:
    parameter = owned.parameter
    if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
        raise ValueError(
            f"parameter '{owned.name}' has hooks but no storage yet: they would be lost. Register them in `bind`."
        )


def _layout(parameter: Any) -> tuple[DeviceMesh, Sequence[Placement]] | None:
    """Mesh and placements of a DTensor, told by its attributes: importing DTensor takes time that few runs need."""
    return (parameter.device_mesh, parameter.placements) if hasattr(parameter, "placements") else None


def _shard(parameter: nn.Parameter, device: torch.device, dtype: torch.dtype, box: Box | None) -> _Shard:
    """Empty storage for this rank's part of a parameter: all of it, unless it is a DTensor or has a box."""
    shape = tuple(parameter.shape)
    if box is not None:
        return _Shard(torch.empty(shape, dtype=dtype, device=device), box.shape, box.offset)
    layout = _layout(parameter)
    if layout is None:
        return _Shard(torch.empty(shape, dtype=dtype, device=device), shape, (0,) * len(shape))
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    local, offset = compute_local_shape_and_global_offset(shape, *layout)
    return _Shard(torch.empty(local, dtype=dtype, device=device), shape, tuple(offset))


def _fill_shard(seed: int, owned: Owned, shard: _Shard) -> None:
    fill(shard.target, owned.name, initial_values(owned), seed=seed, shape=shard.shape, offset=shard.offset)


def _adopt(owned: Owned, shard: _Shard) -> None:
    """Put the values into the parameter, which keeps its layout."""
    parameter, data, layout = owned.parameter, shard.target, _layout(owned.parameter)
    if layout is not None:
        from torch.distributed.tensor import DTensor

        shape, stride = parameter.shape, parameter.stride()
        data = DTensor.from_local(data, *layout, run_check=False, shape=shape, stride=stride)
    place(parameter, data, owned.name)


def place(parameter: nn.Parameter, data: Tensor, name: str) -> None:
    """Let ``parameter``, from meta, have ``data``; it stays the same object.

    Raises:
        ValueError: somebody holds a weak reference to it or a hook on it from before it had storage.
    """
    fresh = nn.Parameter(data, requires_grad=parameter.requires_grad)
    fresh.__dict__.update(parameter.__dict__)
    try:
        torch.utils.swap_tensors(parameter, fresh)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise ValueError(f"parameter '{name}' cannot get its storage: {error}") from error


def _materialize_buffers(prefix: str, module: nn.Module, device: torch.device) -> None:
    own = dict(module.named_buffers(recurse=False))
    reset: Any = getattr(module, "reset_buffers", None)
    if own and reset is not None:
        reset(device)
        return
    for leaf, buffer in own.items():
        if buffer.is_meta:
            raise ValueError(
                f"buffer '{prefix}.{leaf}' is on meta, and {type(module).__name__} has no reset_buffers(device)"
            )
        module._buffers[leaf] = buffer.to(device)
