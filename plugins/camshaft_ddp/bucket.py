"""A bucket: one flat buffer, and the gradients of some parameters as views into it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from camshaft.comm import Channel, Pending
from camshaft.stages import ONLY, Stages
from camshaft_ddp.limits import FIRST_BYTES

ALIGNMENT = 16
"""Elements; every gradient starts at a multiple, so that vector loads of fused kernels stay aligned."""


class Bucket:
    """Gradients of ``parameters`` (of one dtype, on one device) in one buffer, with a flag a parameter at its end.

    All of them get their gradients in the backwards of the same pipeline ``stages``.

    The flags are summed with the gradients: a parameter that this rank did not use learns whether another rank did,
    without a collective of its own.
    """

    def __init__(self, parameters: Sequence[Parameter], stages: Stages = ONLY) -> None:
        self.parameters, self.stages = tuple(parameters), stages
        starts, size = [], 0
        for parameter in self.parameters:
            starts.append(size)
            size += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
        first = self.parameters[0]
        self.flat = torch.zeros(size + len(starts), dtype=gradient_dtype(first), device=first.device)
        self.views = tuple(
            self.flat[start : start + parameter.numel()].view(parameter.shape)
            for start, parameter in zip(starts, self.parameters, strict=True)
        )
        self.flags = self.flat[size:]
        self.ready = 0
        """Gradients that the backward that runs has brought."""
        self.complete = False
        self._pending: Pending | None = None
        self._narrow: Tensor | None = None

    def adopt(self) -> None:
        """Copy gradients that backward made anew into their views, and let the parameters hold the views."""
        views, fresh = [], []
        for parameter, view in zip(self.parameters, self.views, strict=True):
            gradient = parameter.grad
            if gradient is not None and gradient is not view:
                views.append(view)
                fresh.append(gradient)
                parameter.grad = view
        if fresh:
            torch._foreach_copy_(views, fresh)

    def launch(self, channel: Channel, dtype: torch.dtype) -> None:
        """Start the sum over the ranks of ``channel``, in ``dtype`` on the wire."""
        unused = [parameter.grad is None for parameter in self.parameters]
        self.flags.fill_(1)
        if any(unused):
            for index, missing in enumerate(unused):
                if missing:
                    self.views[index].zero_()
                    self.flags[index] = 0
        if dtype != self.flat.dtype:
            self._narrow = self.flat.to(dtype)
        buffer = self.flat if self._narrow is None else self._narrow
        self._pending = channel.all_reduce(buffer, "reduce")

    def finish(self) -> None:
        """Wait for the sum; give a gradient to parameters that only other ranks used."""
        assert self._pending is not None
        self._pending.wait()
        self._pending = None
        if self._narrow is not None:
            self.flat.copy_(self._narrow)
            self._narrow = None
        for index, parameter in enumerate(self.parameters):
            # Reading a flag waits for the device; only a parameter without a local gradient pays for it.
            if parameter.grad is None and bool(self.flags[index] > 0):
                parameter.grad = self.views[index]

    def reset(self) -> None:
        """Drop the gradients, ready for the next window."""
        self.ready, self.complete = 0, False
        for parameter in self.parameters:
            parameter.grad = None


def gradient_dtype(parameter: Parameter) -> torch.dtype:
    """Dtype in which backward adds up the parameter's gradient; it may be wider than the parameter."""
    return parameter.grad_dtype or parameter.dtype


def fill(parameters: Sequence[Parameter], bucket_bytes: int, stages: Stages = ONLY) -> list[Bucket]:
    """Buckets of at most ``bucket_bytes`` (or one larger parameter) in the given order, one dtype and device each.

    All of ``parameters`` belong to the same ``stages``. The first bucket holds at most ``FIRST_BYTES``.
    """
    groups: list[list[Parameter]] = []
    open_groups: dict[tuple[torch.dtype, torch.device], tuple[list[Parameter], int]] = {}
    for parameter in parameters:
        dtype = gradient_dtype(parameter)
        kind, size = (dtype, parameter.device), parameter.numel() * dtype.itemsize
        members, used = open_groups.get(kind, ([], 0))
        limit = bucket_bytes if groups else min(bucket_bytes, FIRST_BYTES)
        if members and used + size > limit:
            groups.append(members)
            members, used = [], 0
        members.append(parameter)
        open_groups[kind] = (members, used + size)
    groups += [members for members, _ in open_groups.values()]
    return [Bucket(members, stages) for members in groups]
