"""Units that are gathered: the buffer that each is gathered into, who uses it now, and in which order they are used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import Tensor

from camshaft.comm import Pending
from camshaft_zero.storage import Unit, nothing


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
        self.visits: list[Visit] = []
        """Forwards that run now, the innermost last."""
        self.due: Counter[int] = Counter()
        """Forwards of each microbatch whose backward is to come, or runs."""

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
    microbatch: int
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
    """Seats in the order in which the first forward used them."""

    seats: list[Seat] = field(default_factory=list)
    learning: bool = True

    def beside(self, seat: Seat, ahead: int, step: int) -> Iterator[Seat]:
        """The next ``ahead`` seats in forward (``step`` 1) or backward (-1)."""
        if seat in self.seats:
            at = self.seats.index(seat)
            for distance in range(1, ahead + 1):
                place = at + step * distance
                if 0 <= place < len(self.seats):
                    yield self.seats[place]


class Turn:
    """What happens when the gradient of a tensor comes: first to backwards that it ends, then to those it begins.

    Hooks run in the order of forward, in which the tensor was an output first; but a unit that begins may need the
    buffer of the one that ends.
    """

    def __init__(self, version: int) -> None:
        self.version = version
        self.ends: list[Callable[[], None]] = []
        self.begins: list[Callable[[], None]] = []

    def __call__(self, _: Tensor) -> None:
        for act in (*self.ends, *self.begins):
            act()


def turn_of(tensor: Tensor) -> Turn:
    """The turn of ``tensor`` as it is now: what is written into it in place has a gradient of its own."""
    turn: Turn | None = getattr(tensor, "camshaft_turn", None)
    if turn is None or turn.version != tensor._version:
        turn = Turn(tensor._version)
        tensor.camshaft_turn = turn  # type: ignore[attr-defined]
        tensor.register_hook(turn)  # type: ignore[no-untyped-call]
    return turn
