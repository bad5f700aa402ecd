"""Where DeepSpeed has put which elements of which parameter: its flat tensors as parts.

A flat tensor of DeepSpeed's holds parameters of one group of the optimizer. It is seen here as one part for each run
of parameters of one role, a view into it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, Parameter

from camshaft.comm import Channel
from camshaft.errors import MachineError
from camshaft.parts import Part, Parts, Piece


@dataclass(frozen=True, slots=True, eq=False)
class Flat:
    """A flat tensor of this rank's master weights. ``group``: of the optimizer; ``pieces`` in the order of place."""

    tensor: Tensor
    group: int
    pieces: tuple[Piece, ...]


def names_of(model: Module) -> dict[Tensor, str]:
    """First name of each parameter."""
    return {parameter: name for name, parameter in model.named_parameters()}


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """Of the whole parameter, also while stage 3 has it divided."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def first_parts(model: Module, roles: Mapping[str, str]) -> Parts:
    """The model's own parameters, for the optimizer to be built over; DeepSpeed replaces them by flat tensors."""
    return Parts(
        Part(parameter, roles[name], (Piece(name, shape := whole_shape(parameter), 0, 0, torch.Size(shape).numel()),))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    )


def shard(parameter: Any, name: str, place: int) -> Piece:
    """Stage 3: this rank's stretch of a parameter, perhaps empty, at ``place`` of what holds it."""
    size: int = parameter.partition_numel()
    start = dist.get_rank(parameter.ds_process_group) * size
    return Piece(name, whole_shape(parameter), start, place, max(0, min(size, parameter.ds_numel - start)))


def parts_of(flat: Flat, roles: Mapping[str, str]) -> Iterator[Part]:
    """Views of a flat tensor, one for each run of one role; padding belongs to the run before it."""
    runs = [list(run) for _, run in groupby(flat.pieces, key=lambda piece: roles[piece.name])]
    bounds = [0, *(run[0].place for run in runs[1:]), flat.tensor.numel()]
    if not runs:
        yield Part(Parameter(flat.tensor.data), "matrix", ())
    for run, begin, end in zip(runs, bounds, bounds[1:], strict=False):
        pieces = tuple(Piece(p.name, p.shape, p.start, p.place - begin, p.length) for p in run)
        yield Part(Parameter(flat.tensor.data[begin:end]), roles[run[0].name], pieces)


def stored_parts(model: Module, roles: Mapping[str, str], channel: Channel | None) -> Parts:
    """Stage 3: this rank's stretch of each parameter that does not train.

    Raises:
        MachineError: one of them lies on a disk.
    """
    found = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and hasattr(parameter, "ds_tensor"):
            piece = shard(parameter, name, 0)
            if parameter.ds_tensor.numel() < piece.length:
                raise MachineError(
                    f"'{name}' does not train, and DeepSpeed keeps it on a disk alone, where no checkpoint can read "
                    "it: set offload_parameters to cpu"
                )
            held = Parameter(parameter.ds_tensor.data, requires_grad=False)
            found.append(Part(held, roles[name], (piece,) if piece.length else ()))
    return Parts(found, channel)


def zero_padding(flat: Flat) -> None:
    """DeepSpeed leaves padding as the allocator had it."""
    kept = torch.zeros(flat.tensor.numel(), dtype=torch.bool, device=flat.tensor.device)
    for piece in flat.pieces:
        kept[piece.place : piece.place + piece.length] = True
    flat.tensor.data.masked_fill_(~kept, 0)
