"""What this rank holds of each tensor of a checkpoint: all of it, its share of a DTensor, or stretches of it.

The model says it of what it holds itself; ``world.parts`` and ``world.stored`` say it of what an owner of storage
holds elsewhere: master weights, and parameters that are divided over ranks in flat buffers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Module

from camshaft.errors import CheckpointError
from camshaft.parts import Part
from camshaft_checkpoint.boxes import Place, boxes

if TYPE_CHECKING:
    from camshaft.state import State


class Divided:
    """Stretches of a tensor of whole shape ``shape`` that lie in flat buffers, as boxes of it.

    ``boxes`` maps where a box begins to a view of the memory that holds it; the view's shape is the box's extent.
    """

    def __init__(self, shape: Place, dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        self.boxes: dict[Place, Tensor] = {}

    def add(self, start: int, flat: Tensor) -> None:
        """``flat`` [n] holds elements ``start`` to ``start + n`` of the row-major flattening."""
        place = 0
        for offsets, extent in boxes(self.shape, start, flat.numel()):
            size = prod(extent)
            self.boxes[offsets] = flat[place : place + size].view(extent)
            place += size


Held = Tensor | Divided


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
    skipped = set(names)
    found: dict[str, Held] = {
        name: tensor.detach() for name, tensor in model_tensors(state.model).items() if name not in skipped
    }
    for part in _elsewhere(state):
        spread(found, part, part.tensor)
    return found


def spread(found: dict[str, Held], part: Part, values: Tensor) -> None:
    """Add to ``found`` the pieces of ``values``, which is laid out as the part's tensor."""
    if part.whole:
        found[part.pieces[0].name] = values.detach()
        return
    for piece, flat in part.slices(values.detach()):
        held = found.setdefault(piece.name, Divided(piece.shape, values.dtype))
        assert isinstance(held, Divided), f"a part holds '{piece.name}' whole, and another a piece of it"
        held.add(piece.start, flat)


def _elsewhere(state: State) -> Iterator[Part]:
    live = {id(parameter) for parameter in state.model.parameters()}
    for parts in (state.world.parts, state.world.stored):
        yield from (part for part in parts if id(part.tensor) not in live)
