"""What this rank holds of each tensor of a checkpoint: all of it, its share of a DTensor, or boxes of it.

The model says it of what it holds itself; ``world.parts`` and ``world.stored`` say it of what an owner of storage
holds elsewhere: master weights, and parameters that are divided over ranks in flat buffers. Where axes of the model
divide a parameter too, ``world.boxes`` and the pieces tell which rectangle of the whole one all of that is about.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module

from camshaft.errors import CheckpointError
from camshaft.parts import Box, Part, Piece
from camshaft_checkpoint.boxes import Place, boxes

if TYPE_CHECKING:
    from camshaft.state import State


class Divided:
    """Boxes of a tensor of whole shape ``shape``, of which this rank holds a part.

    ``boxes`` maps where a box begins to a view of the memory that holds it; the view's shape is the box's extent.
    ``copied`` is the rectangle (offset, extent) that all of them lie in, where ranks along the axes of the model have
    that rectangle too: they may have cut it otherwise, and one of them writes it.
    """

    def __init__(self, shape: Place, dtype: torch.dtype, copied: tuple[Place, Place] | None = None) -> None:
        self.shape, self.dtype, self.copied = shape, dtype, copied
        self.boxes: dict[Place, Tensor] = {}

    @classmethod
    def of(cls, tensor: Tensor, box: Box) -> Divided:
        """``tensor`` (a DTensor: this rank's share) is a rectangle of what ``box`` tells the whole of."""
        local, offset = _local(tensor)
        made = cls(box.shape, tensor.dtype, _copied(box, tuple(tensor.shape)))
        if local.numel():
            made.boxes[_moved(offset, box.offset)] = local
        return made

    @classmethod
    def like(cls, piece: Piece, dtype: torch.dtype) -> Divided:
        """Room for stretches of the parameter that ``piece`` is of."""
        return cls(piece.whole_shape, dtype, None if piece.box is None else _copied(piece.box, piece.shape))

    def add(self, start: int, flat: Tensor, within: tuple[Place, Place] | None = None) -> None:
        """``flat`` [n] holds elements ``start`` to ``start + n`` of the row-major flattening.

        Of the rectangle ``within`` (offset, extent); without it, of the whole.
        """
        offset, shape = within or ((0,) * len(self.shape), self.shape)
        if 0 in shape and 0 not in self.shape:
            return  # a rank without a share; the box of another one begins there
        place = 0
        for offsets, extent in boxes(shape, start, flat.numel()):
            size = prod(extent)
            self.boxes[_moved(offsets, offset)] = flat[place : place + size].view(extent)
            place += size


def _moved(place: Place, by: Place) -> Place:
    return tuple(at + more for at, more in zip(place, by, strict=True))


def _copied(box: Box, extent: Place) -> tuple[Place, Place] | None:
    return (box.offset, extent) if box.copies > 1 else None


def _local(tensor: Any) -> tuple[Tensor, Place]:
    """What this rank holds of a tensor, and where that begins."""
    if not hasattr(tensor, "placements"):
        return tensor, (0,) * tensor.ndim
    # As in the model's first values: torch has no public function that tells where an uneven share begins.
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), tuple(offset)


Held = Tensor | Divided


def in_box(tensor: Tensor, box: Box | None) -> Held:
    """``tensor`` as what it is of the whole parameter; itself where it is all of that."""
    if box is None or tuple(tensor.shape) == box.shape:  # so where the whole is empty, too
        return tensor
    return Divided.of(tensor, box)


def model_tensors(model: Module) -> dict[str, Tensor]:
    """Live parameters and persistent buffers by name, without the ``model.`` of the checkpoint; tied ones once.

    Raises:
        CheckpointError: the module has extra state that is not a tensor.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"the model's '{name}' is a {type(value).__name__}; only tensors can be saved")
        if id(value) not in seen:
            seen.add(id(value))
            found[name] = value
    return found


def apart(state: State) -> set[str]:
    """Parameters that this rank holds elsewhere than in the model, in whole or in part.

    What any rank holds so must not be taken from the model on any: there it may be narrower, or not be there at all.
    """
    return {piece.name for part in _elsewhere(state) for piece in part.pieces}


def weights(state: State, names: Iterable[str]) -> dict[str, Held]:
    """What this rank holds of parameters and buffers, by name; of ``names``, which are held apart, from the parts."""
    skipped, rectangles = set(names), state.world.boxes
    found: dict[str, Held] = {
        name: in_box(tensor.detach(), rectangles.get(name))
        for name, tensor in model_tensors(state.model).items()
        if name not in skipped
    }
    for part in _elsewhere(state):
        spread(found, part, part.tensor)
    return found


def spread(found: dict[str, Held], part: Part, values: Tensor) -> None:
    """Add to ``found`` the pieces of ``values``, which is laid out as the part's tensor."""
    if part.whole:
        found[part.pieces[0].name] = in_box(values.detach(), part.pieces[0].box)
        return
    for piece, flat in part.slices(values.detach()):
        held = found.setdefault(piece.name, Divided.like(piece, values.dtype))
        assert isinstance(held, Divided), f"a part holds '{piece.name}' whole, and another a piece of it"
        held.add(piece.start, flat, None if piece.box is None else (piece.box.offset, piece.shape))


def undivided(part: Part) -> bool:
    """Whether the part is one whole parameter as one process would have it (perhaps in a DTensor)."""
    return part.whole and part.pieces[0].shape == part.pieces[0].whole_shape


def _elsewhere(state: State) -> Iterator[Part]:
    live = {id(parameter) for parameter in state.model.parameters()}
    for parts in (state.world.parts, state.world.stored):
        yield from (part for part in parts if id(part.tensor) not in live)
