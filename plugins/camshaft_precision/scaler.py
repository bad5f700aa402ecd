"""Dynamic loss scaling: one decision on all ranks whether gradients overflowed, and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from camshaft.errors import NonFiniteLoss

if TYPE_CHECKING:
    from camshaft.hookspecs import Step
    from camshaft.mesh import MeshShape
    from camshaft.state import State

SMALLEST, LARGEST = 1.0, 2.0**64
"""Below 1 scaling would lose what it is for. Above the largest, the scale of gradients that are always 0 would run away
until fp32 cannot hold it."""


class LossScaler:
    """Sets ``state.loss_scale``, divides it out of the gradients, and skips steps whose gradients are not finite.

    The scale is a power of two, so that multiplying and dividing by it is exact.
    """

    def __init__(self, state: State, name: str, *, initial: float, growth_interval: int) -> None:
        self._state, self._name, self._interval = state, name, growth_interval
        device, mesh = state.world.device, state.world.mesh
        self._found = torch.zeros((), device=device)
        """Above 0 where a gradient of this window is not finite, on any rank."""
        self._inverse = torch.zeros((), device=device)
        channels = [mesh.channel(name, axis) for axis in _axes(mesh.shape)]
        self._channels = [channel for channel in channels if channel is not None]
        self._good = self._skipped = 0
        state.loss_scale = torch.zeros((), device=device)
        self._set(initial)

    def unscale(self) -> None:
        """Divide the gradients of all parts by the scale, in place, and agree whether all of them are finite.

        Parts may be divided over ranks, and ranks of an axis may have other parameters: so over every axis.
        """
        gradients = [_local(tensor.grad) for tensor in self._state.world.parts.tensors if tensor.grad is not None]
        self._found.zero_()
        unscale_(gradients, self._found, self._inverse)
        for channel in self._channels:
            channel.all_reduce(self._found, "post_reduce", op="max").wait()

    def step(self, call: Step) -> None:
        """Run ``call`` if all gradients are finite; else mark the step as skipped. Waits for the device.

        Raises:
            NonFiniteLoss: they are not, and the scale cannot be lowered any more.
        """
        if bool(self._found):
            self._skip()
        else:
            call()
            self._good += 1
            if self._good == self._interval:
                self._good = 0
                self._set(min(self._scale * 2, LARGEST))
        extras = self._state.extras
        extras[f"plugin/{self._name}/loss_scale"] = self._scale
        extras[f"plugin/{self._name}/skipped_steps"] = self._skipped

    def _skip(self) -> None:
        if self._scale <= SMALLEST:
            raise NonFiniteLoss(
                f"gradients are not finite in fp16 at step {self._state.step + 1}, with a loss scale of "
                f"{self._scale:g}, the smallest: {self._skipped} step(s) were skipped before. Set "
                f"plugins.{self._name}.compute=bf16, which needs no scale, or lower the learning rate"
            )
        self._state.skipped = True
        self._skipped += 1
        self._good = 0
        self._set(max(self._scale / 2, SMALLEST))

    def _set(self, scale: float) -> None:
        assert self._state.loss_scale is not None
        self._scale = scale
        self._state.loss_scale.fill_(scale)
        self._inverse.fill_(1.0 / scale)

    def state_dict(self) -> Mapping[str, Any]:
        """Scale, good steps since it was changed, and skipped steps of the whole run."""
        return {"loss_scale": self._scale, "good_steps": self._good, "skipped_steps": self._skipped}

    def load_state_dict(self, entries: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._good, self._skipped = entries["good_steps"], entries["skipped_steps"]
        self._set(entries["loss_scale"])


def unscale_(gradients: Sequence[Tensor], found: Tensor, inverse: Tensor) -> None:
    """Multiply ``gradients`` by ``inverse`` in place; ``found`` becomes 1 if any of them is not finite.

    ``found`` and ``inverse`` are fp32 scalars where the gradients are. One pass over the gradients, for each dtype: the
    function reads all that it gets in the dtype of the first. torch has no public name for it:
    ``torch.amp.GradScaler`` calls the same function, but agrees on nothing with other ranks.
    """
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        if gradient.numel():
            by_dtype.setdefault(gradient.dtype, []).append(gradient)
    for several in by_dtype.values():
        torch._amp_foreach_non_finite_check_and_unscale_(several, found, inverse)


def _axes(shape: MeshShape) -> list[str]:
    """Axes of more than one rank, an axis that was divided in two as the one that it is: one collective less."""
    joined = shape.names[len(shape.axes) :]
    halves = {half for name in joined for half in shape.members(name)}
    names = [*joined, *(axis.name for axis in shape.axes if axis.name not in halves)]
    return [name for name in names if shape[name].degree > 1]


def _local(gradient: Tensor) -> Tensor:
    """This rank's shard of a DTensor, told by its method: importing the class takes time that few runs need."""
    to_local = getattr(gradient, "to_local", None)
    local: Tensor = gradient if to_local is None else to_local()
    return local
