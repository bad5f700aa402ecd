"""What an optimizer updates: tensors that hold parameters, or flat ranges of them, and whose they are.

The owner of storage decides how parameters lie in memory and over ranks, and says so with ``Parts``. Optimizers,
clipping, checkpoints and proofs read it there, and need not know who divided what. Without an owner each parameter is
its own part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import Parameter

from camshaft.boxes import Box as Box

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from camshaft.comm import Channel


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements ``start`` to ``start + length`` of the row-major flattening of parameter ``name`` of this rank's model.

    They lie at ``place`` of the flattened tensor that holds them. ``shape`` is that of the model's parameter, which is
    whole where ``box`` is None, and else the rectangle of the whole one that ``box`` tells.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    place: int
    length: int
    box: Box | None = None

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """Shape of the parameter as one process would have it."""
        return self.shape if self.box is None else self.box.shape

    @property
    def copies(self) -> int:
        """How often one copy of the whole model has these elements."""
        return 1 if self.box is None else self.box.copies


@dataclass(slots=True, eq=False)
class Part:
    """A tensor that is updated as one, and the pieces of parameters in it; all of them have one role.

    ``tensor`` is a parameter of the model itself (then it has its shape, and is the only piece), or a tensor of the
    owner's: 1-D, in the master dtype, with a ``grad`` from ``post_reduce`` to ``release``. Elements of it in no piece
    are padding: they and their gradients are always 0. A part may be empty on this rank (no pieces).
    """

    tensor: Parameter
    role: str
    pieces: tuple[Piece, ...]

    @property
    def whole(self) -> bool:
        """Whether the tensor is one parameter of this rank's model, all of it, in its shape (perhaps a DTensor)."""
        shape = tuple(self.tensor.shape)
        return len(self.pieces) == 1 and self.pieces[0].shape == shape and self.pieces[0].length == prod(shape)

    def slices(self, values: Tensor) -> Iterator[tuple[Piece, Tensor]]:
        """Each piece with its own stretch, a 1-D view of ``values``, which is laid out as ``tensor``."""
        flat = values.reshape(-1)
        for piece in self.pieces:
            yield piece, flat[piece.place : piece.place + piece.length]


class Parts:
    """All parts of this rank.

    ``channel`` reaches the ranks that hold the other pieces of this rank's parameters, along data axes; None if every
    part is whole. ``holders`` reaches those, times the axes that divide a parameter itself (tensor parallel): sums over
    one whole parameter go there. ``everyone`` reaches these, times the axes that divide the model into parameters
    (pipeline parallel), so the ranks that together hold one copy of the model: sums over all parameters (the norm) go
    there. In both each piece counts 1 / ``copies``; None where that is this rank alone. The build sets them.
    """

    def __init__(self, parts: Iterable[Part], channel: Channel | None = None) -> None:
        self._parts = list(parts)
        self.channel = channel
        self.holders = self.everyone = channel
        self.version = 0
        """How often parts were split: what was looked up in them holds while this stays the same."""

    def __iter__(self) -> Iterator[Part]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    @property
    def tensors(self) -> list[Parameter]:
        """What an optimizer is given, in order."""
        return [part.tensor for part in self._parts]

    def attach(self, boxes: Mapping[str, Box]) -> None:
        """Tell every piece which rectangle of the whole parameter its own is of."""
        for part in self._parts:
            part.pieces = tuple(replace(piece, box=boxes.get(piece.name)) for piece in part.pieces)

    def isolate(self, names: Iterable[str], optimizer: Optimizer | None = None) -> None:
        """Give each parameter of ``names`` parts of its own: it can be without a gradient, or be updated differently.

        Tensors are split as views; the optimizer's groups and state follow, if there is one yet, so the numbers stay.
        Local; no rank waits. Which elements of which parameter this rank holds does not change, nor does their order.
        """
        wanted = set(names)
        fresh: list[Part] = []
        for part in self._parts:
            mixed = len(part.pieces) > 1 and any(piece.name in wanted for piece in part.pieces)
            fresh += _split(part, wanted, optimizer) if mixed else [part]
        self._parts = fresh
        self.version += 1


def _split(part: Part, names: set[str], optimizer: Optimizer | None) -> list[Part]:
    runs: list[list[Piece]] = []
    for piece in part.pieces:
        if runs and piece.name not in names and runs[-1][-1].name not in names:
            runs[-1].append(piece)
        else:
            runs.append([piece])
    bounds = [run[0].place for run in runs[1:]]
    ranges = list(zip([0, *bounds], [*bounds, part.tensor.numel()], strict=True))
    fresh = []
    for run, (begin, end) in zip(runs, ranges, strict=True):
        pieces = tuple(replace(piece, place=piece.place - begin) for piece in run)
        tensor = Parameter(part.tensor.data[begin:end])
        if part.tensor.grad is not None:
            tensor.grad = part.tensor.grad[begin:end]
        fresh.append(Part(tensor, part.role, pieces))
    if optimizer is not None:
        _move_state(part.tensor, [each.tensor for each in fresh], ranges, optimizer)
    return fresh


def _move_state(old: Parameter, fresh: list[Parameter], ranges: list[tuple[int, int]], optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        group["params"] = [
            each for member in group["params"] for each in (fresh if member is old else [member])
        ]  # `in` would compare values
    state = optimizer.state.pop(old, None)
    if state is None:
        return
    for tensor, (begin, end) in zip(fresh, ranges, strict=True):
        optimizer.state[tensor] = {
            key: (value[begin:end] if value.shape == old.shape else value.clone())
            if isinstance(value, Tensor)
            else value
            for key, value in state.items()
        }
