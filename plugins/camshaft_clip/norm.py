"""The global norm over plain, divided, copied and laid-out gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from camshaft.parts import Part, Parts

Norm = Callable[[list[Tensor]], Tensor]
Spans = tuple[tuple[int, int, int], ...]
"""(begin, end, copies) of each stretch of a part's flattened tensor whose elements have equally many copies."""


class Clipper:
    """Clips the gradients of ``parts``.

    ``master`` is the dtype of the norm where ranks agree on it, and ``device`` where it lies: ranks without any part
    cannot tell. ``max_norm`` None: nothing is changed. ``local``: another implementation of the L2 norm over tensors of
    one dtype and device that are here.
    """

    def __init__(
        self,
        parts: Parts,
        max_norm: float | None,
        *,
        master: torch.dtype,
        device: torch.device,
        local: Norm | None = None,
    ) -> None:
        self._local = local or _local_norm
        self.parts, self._max_norm, self._device = parts, max_norm, device
        self._wide = torch.float64 if master == torch.float64 else torch.float32
        self._version = -1
        self._spans: list[tuple[Part, Spans]] = []

    def __call__(self) -> Tensor:
        """Clip in place; return the norm before clipping, a scalar in fp32 or wider on the gradients' device.

        Parts without a gradient are left out. A NaN or infinite norm makes every gradient NaN or zero, and is
        returned as it is: the core refuses it at the next log interval. Collective where parts are divided over ranks;
        norm and coefficient are then equal in every bit on all of them.
        """
        norm = self.norm()
        coefficient = self.coefficient(norm)
        if coefficient is not None:
            self.scale(coefficient)
        return norm

    def coefficient(self, norm: Tensor) -> Tensor | None:
        """Factor on all gradients that limits ``norm``, a scalar on its device; None where it is known to be 1."""
        if self._max_norm is None:
            return None
        coefficient = torch.clamp(self._max_norm / (norm + 1e-6), max=1.0)
        # On a CPU looking costs nothing, and a pass over all gradients that multiplies by 1 is saved. NaN is not 1.
        return None if coefficient.is_cpu and bool(coefficient == 1.0) else coefficient

    def scale(self, coefficient: Tensor) -> None:
        """Multiply every gradient by ``coefficient`` in place."""
        gradients = [_local(tensor.grad) for tensor in self.parts.tensors if tensor.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, coefficient)

    def norm(self) -> Tensor:
        """L2 norm over the gradients of one copy of the model, each element counted once.

        Where parts are divided over ranks, or ranks hold other parts, the squares of all are summed over those, what
        several of them hold divided by how many they are. Gradients that are DTensors contribute their local shard;
        their squares are summed over the mesh axes that they are sharded on, one reduction for each distinct layout.
        Without any gradient it is 0.
        """
        everyone = self.parts.everyone
        if everyone is None or everyone.size == 1:
            return self._norm_here([tensor.grad for tensor in self.parts.tensors if tensor.grad is not None])
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for copies, members in self._by_copies().items():
            total += _square(members, self._local).div_(copies)
        everyone.all_reduce(total, "clip").wait()
        return total.sqrt().to(self._wide)

    def _norm_here(self, gradients: Sequence[Tensor]) -> Tensor:
        if not gradients:
            return torch.zeros((), device=self._device)
        if len({_layout(gradient) for gradient in gradients}) == 1 and not isinstance(gradients[0], DTensor):
            return self._local([*gradients])
        wide = any(gradient.dtype == torch.float64 for gradient in gradients)
        return _square(gradients, self._local).sqrt().to(torch.float64 if wide else torch.float32)

    def _by_copies(self) -> dict[int, list[Tensor]]:
        """Gradients, or stretches of them, by how many ranks hold the same."""
        if self._version != self.parts.version:
            self._version = self.parts.version
            self._spans = [(part, tuple(_spans(part))) for part in self.parts]
        found: dict[int, list[Tensor]] = {}
        for part, spans in self._spans:
            gradient = part.tensor.grad
            if gradient is None:
                continue
            if len(spans) == 1:
                found.setdefault(spans[0][2], []).append(gradient)
                continue
            flat = gradient.view(-1)
            for begin, end, copies in spans:
                found.setdefault(copies, []).append(flat[begin:end])
        return found


def _spans(part: Part) -> Iterator[tuple[int, int, int]]:
    for copies, run in groupby(part.pieces, key=lambda piece: piece.copies):
        pieces = list(run)  # between them is padding, which is 0
        yield pieces[0].place, pieces[-1].place + pieces[-1].length, copies


def _square(gradients: Iterable[Tensor], local: Norm) -> Tensor:
    """Square of the norm, fp64; of DTensors over all their shards."""
    layouts: dict[object, list[Tensor]] = {}
    for gradient in gradients:
        layouts.setdefault(_layout(gradient), []).append(gradient)
    return torch.stack([_reduced_square(members, local) for members in layouts.values()]).sum()


def _reduced_square(members: Sequence[Tensor], local: Norm) -> Tensor:
    square = local([_local(member) for member in members]).double().square()
    first = members[0]
    if isinstance(first, DTensor):
        for axis, placement in enumerate(first.placements):
            if placement.is_partial():
                raise ValueError("a gradient is still partial: it was not reduced before the norm was taken")
            if placement.is_shard():
                torch.distributed.all_reduce(square, group=first.device_mesh.get_group(axis))
    return square


def _local_norm(tensors: Sequence[Tensor]) -> Tensor:
    wide = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    norms = torch._foreach_norm(list(tensors), 2.0, dtype=wide)
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


def _layout(gradient: Tensor) -> object:
    if isinstance(gradient, DTensor):
        return (gradient.device_mesh, gradient.placements, gradient.dtype)
    return gradient.dtype


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
