"""DeepSpeed's three optimizers behind one face: where flat tensors and gradients are, and what they go on adding to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module

from camshaft.parts import Piece
from camshaft_deepspeed.layout import Flat, names_of, shard


class Stage(Protocol):
    """One of DeepSpeed's optimizers."""

    def flats(self, model: Module) -> list[Flat]:
        """Every flat tensor of master weights on this rank, in DeepSpeed's order."""

    def gradient(self, number: int, master: Tensor) -> Tensor:
        """The reduced gradient of flat tensor ``number``, in the dtype of ``master``; the step takes it as it is."""

    def forget(self) -> None:
        """Drop gradients, and sums that a window would otherwise add to."""

    def spread(self) -> None:
        """Make parameters of master weights."""


def stage_of(zero: Any) -> Stage:
    """The face of ``zero``, told by what it has."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return Scattered(zero)
    return Wide(zero) if hasattr(zero, "fp32_groups_flat_partition") else Cut(zero)


class _Stretches:
    """The parameters of a group side by side, cut into one equal stretch a rank."""

    def __init__(self, zero: Any) -> None:
        self._zero = zero

    def _flats(self, model: Module, masters: Sequence[Tensor], members: Sequence[Any]) -> list[Flat]:
        """Of each group's master weights, one stretch of those of its ``members``."""
        groups, names = self._zero.real_dp_process_group, names_of(model)
        return [_cut(tensor, at, members[at], groups[at], names) for at, tensor in enumerate(masters)]

    def spread(self) -> None:
        """See ``Stage``."""
        self._zero.update_lp_params()


class Cut(_Stretches):
    """Stages 1 and 2."""

    def flats(self, model: Module) -> list[Flat]:
        """See ``Stage``."""
        return self._flats(model, self._zero.single_partition_of_fp32_groups, self._zero.round_robin_bit16_groups)

    def gradient(self, number: int, master: Tensor) -> Tensor:
        """See ``Stage``. Offloaded gradients are in the master's ``grad`` already."""
        if self._zero.cpu_offload:
            assert master.grad is not None
            return master.grad
        return _side_by_side(self._zero.averaged_gradients, number, master)

    def forget(self) -> None:
        """See ``Stage``. Of what is offloaded, DeepSpeed would add the next window to this one's sums."""
        self._zero.zero_grad(set_to_none=True)
        self._zero.averaged_gradients.clear()
        if self._zero.cpu_offload:
            self._zero.accumulated_grads_in_cpu.clear()


class Wide(_Stretches):
    """Stage 1 with bf16 parameters whose gradients are kept in fp32: DeepSpeed has an optimizer of its own for it."""

    def flats(self, model: Module) -> list[Flat]:
        """See ``Stage``."""
        return self._flats(model, self._zero.fp32_groups_flat_partition, self._zero.bf16_groups)

    def gradient(self, number: int, master: Tensor) -> Tensor:
        """See ``Stage``."""
        held: Tensor = self._zero.fp32_groups_gradient_flat_partition[number]
        return held

    def forget(self) -> None:
        """See ``Stage``."""
        self._zero.zero_grad(set_to_none=True)


class Scattered:
    """Stage 3: each parameter cut into one equal stretch a rank, those of a group side by side."""

    def __init__(self, zero: Any) -> None:
        self._zero = zero

    def flats(self, model: Module) -> list[Flat]:
        """See ``Stage``."""
        names = names_of(model)
        return [self._flat(number, members, names) for number, members in enumerate(self._zero.fp16_groups)]

    def _flat(self, number: int, members: Sequence[Any], names: Mapping[Tensor, str]) -> Flat:
        pieces, place = [], 0
        for parameter in members:
            piece = shard(parameter, names[parameter], place)
            pieces += [piece] if piece.length else []
            place += parameter.partition_numel()
        zero = self._zero
        return Flat(zero.fp32_partitioned_groups_flat[number], zero.sub_group_to_group_id[number], tuple(pieces))

    def gradient(self, number: int, master: Tensor) -> Tensor:
        """See ``Stage``. Offloaded gradients are in the master's ``grad`` already."""
        if self._zero.offload_optimizer:
            assert master.grad is not None
            return master.grad
        return _side_by_side(self._zero.averaged_gradients, number, master)

    def forget(self) -> None:
        """See ``Stage``. A parameter that the first backward of a window leaves out would add to this one's sums."""
        self._zero.zero_grad(set_to_none=True)
        self._zero.averaged_gradients.clear()
        self._zero.grad_partitions_flat_buffer.zero_()

    @torch.no_grad()
    def spread(self) -> None:
        """See ``Stage``. What stays gathered between steps is let go, and gathered anew by the next forward."""
        self._zero._partition_all_parameters()
        for number in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(number)


class Whole(list[Tensor]):
    """Gradients of a group that lie side by side already; DeepSpeed takes ``flat_partition`` without a copy."""

    def __init__(self, flat: Tensor) -> None:
        super().__init__([flat])
        self.flat_partition = flat


def _side_by_side(averaged: dict[int, Any], number: int, master: Tensor) -> Tensor:
    """One tensor of a group's gradients, put in their place."""
    found = averaged[number]
    flat = getattr(found, "flat_partition", None)
    if flat is None:
        flat = found[0] if len(found) == 1 else torch.cat([each.reshape(-1) for each in found])
    whole: Tensor = flat.view(-1)[: master.numel()].to(master.dtype)
    averaged[number] = Whole(whole)
    return whole


def _cut(tensor: Tensor, group: int, members: Sequence[Tensor], ranks: Any, names: Mapping[Tensor, str]) -> Flat:
    begin = dist.get_rank(ranks) * tensor.numel()
    pieces, place = [], 0
    for parameter in members:
        first, last = max(place, begin), min(place + parameter.numel(), begin + tensor.numel())
        if first < last:
            pieces.append(Piece(names[parameter], tuple(parameter.shape), first - place, first - begin, last - first))
        place += parameter.numel()
    return Flat(tensor, group, tuple(pieces))
