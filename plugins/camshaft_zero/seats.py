"""Units that are gathered: the buffer that each is gathered into, who uses it now, and in which order they are used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from camshaft.comm import Pending
from camshaft_zero.storage import Unit, nothing

Place = tuple[int, int]
"""Pipeline stage and microbatch of a forward."""


class Slot:
    """A buffer that units use in turn."""

    def __init__(self) -> None:
        self.size = 0
        self.buffer: Tensor | None = None
        self.owner: Seat | None = None


class Seat:
    """A unit and its slot."""

    def __init__(self, unit: Unit, slot: Slot) -> None:
        self.unit, self.slot = unit, slot
        slot.size = max(slot.size, unit.layout.size)
        self.flat: Tensor | None = None
        self.held = False
        """Gathered, or being gathered."""
        self.pending: Pending | None = None
        self.users = 0
        """Forwards and backwards that need the parameters now."""
        self.backwards = 0
        self.finished = False
        """Whether all its gradients of the backward that runs have come."""
        self.visits: list[Visit] = []
        """Forwards that run now, the innermost last."""
        self.due: Counter[Place] = Counter()
        """Forwards of each stage and microbatch whose backward is to come, or runs."""

    def seat(self) -> None:
        """Take views of the slot, once its size is settled."""
        assert self.slot.buffer is not None
        self.flat = self.slot.buffer[: self.unit.layout.size]
        data = [(member.parameter, member.view(self.flat)) for member in self.unit.layout.members]
        empty = [nothing(member.shape, self.flat.dtype, self.flat.device) for member in self.unit.layout.members]
        self._views = data
        self._empty = [(parameter, none) for (parameter, _), none in zip(data, empty, strict=True)]

    def show(self) -> None:
        for parameter, view in self._views:
            parameter.data = view

    def hide(self) -> None:
        for parameter, none in self._empty:
            parameter.data = none


@dataclass(slots=True, eq=False)
class Visit:
    """One forward of a module, until its backward is over."""

    seat: Seat
    place: Place
    first: bool
    """Whether forward uses the unit here first, of several modules that are one unit."""
    last: bool
    inputs: int = 0
    """Inputs whose gradient has not come yet."""
    counted: bool = False
    """Whether it has inputs that tell when its backward is over."""
    opened: bool = False
    closed: bool = False


@dataclass(slots=True)
class Order:
    """Seats in the order in which the first forward of a stage used them."""

    seats: list[Seat] = field(default_factory=list)
    left: list[Seat] = field(default_factory=list)
    """As forwards left them, while the order is learned."""
    learning: bool = True

    def settle(self) -> set[Seat]:
        """The order is known now. Returns the seats that stay gathered from forward to backward: what was used last,
        and what is around all others.
        """
        self.learning = False
        inner = [seat for seat in self.left if not seat.unit.group.encloses]
        around = [seat for seat in self.left if seat.unit.group.encloses and not seat.unit.group.depth]
        self.left = []
        return {*inner[-1:], *around}

    def beside(self, seat: Seat, ahead: int, step: int) -> Iterator[Seat]:
        """The next ``ahead`` seats in forward (``step`` 1) or backward (-1)."""
        if seat in self.seats:
            at = self.seats.index(seat)
            for distance in range(1, ahead + 1):
                place = at + step * distance
                if 0 <= place < len(self.seats):
                    yield self.seats[place]


class Passage(torch.autograd.Function):
    """The inputs of one call of a module, unchanged; tells when the gradients of all that are used have come."""

    @staticmethod
    def forward(context: Any, ended: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        """Pass ``tensors`` on."""
        context.ended = ended
        context.set_materialize_grads(False)
        return tensors

    @staticmethod
    def backward(context: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Run after everything that used any of them in this call, whether or not others use them too."""
        context.ended()
        return (None, *gradients)


def watch_inputs(inputs: Any, ended: Callable[[], None]) -> tuple[Any, bool]:
    """``inputs`` (nested tuples, lists, dicts) whose backward tells of its end, and whether any of them has one.

    Other calls may have the same tensors as inputs, so not they are watched, but aliases of this call's own. A lone
    tensor gets one that may be written to in place.
    """
    found = [tensor for tensor in tensors_of(inputs) if tensor.requires_grad]
    if not found:
        return inputs, False
    if len(found) == 1:
        alias = found[0].view_as(found[0])
        alias.register_hook(lambda _: ended())  # type: ignore[no-untyped-call]
        aliases = [alias]
    else:
        aliases = list(Passage.apply(ended, *found))  # type: ignore[no-untyped-call]
    return _replaced(inputs, iter(aliases)), True


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_of(each)
    elif isinstance(value, tuple | list):
        for each in value:
            yield from tensors_of(each)


def _replaced(value: Any, aliases: Iterator[Tensor]) -> Any:
    if isinstance(value, Tensor):
        return next(aliases) if value.requires_grad else value
    if type(value) is dict:
        return {key: _replaced(each, aliases) for key, each in value.items()}
    if isinstance(value, dict):
        for key in list(value):
            value[key] = _replaced(value[key], aliases)
        return value
    if isinstance(value, tuple | list):
        items = [_replaced(each, aliases) for each in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
