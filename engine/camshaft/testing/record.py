"""What is compared of a step: raw gradients, norm, weights, optimizer state, loss, in this order."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Module
from torch.optim import Optimizer

from camshaft.meter import global_sums
from camshaft.parts import Part, Piece
from camshaft.plugin import Plugin, hookimpl
from camshaft.state import State, World


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step. Tensors are copies on the CPU; a parameter without a gradient has None."""

    step: int
    gradients: Mapping[str, Tensor | None]
    norm: float | None
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    loss: float
    lr: float


class Probe(Plugin):
    """Records every step of a run, gradients as they are after every reduction and before clipping."""

    draws = False

    def __init__(self) -> None:
        super().__init__()
        self.records: list[StepRecord] = []
        self._gradients: dict[str, Tensor | None] = {}

    @hookimpl
    def post_reduce(self, state: State) -> None:
        """Copy the gradients before clipping."""
        self._gradients = gradients(state.world, state.model)

    @hookimpl
    def post_step(self, state: State) -> None:
        """Copy what the step left."""
        assert state.window is not None
        loss, weight = global_sums(state.world, state.loss or 0.0, float(state.window.weight))
        self.records.append(
            StepRecord(
                step=state.step,
                gradients=self._gradients,
                norm=None if state.grad_norm is None else float(state.grad_norm),
                weights=weights(state.world, state.model),
                optimizer=optimizer_state(state.world, state.optimizer),
                loss=loss / max(weight, 1.0),
                lr=state.lr,
            )
        )


def gradients(world: World, model: Module) -> dict[str, Tensor | None]:
    """Copies of all summed gradients by name, whole; None for parameters without one."""
    held = {part: part.tensor.grad for part in world.parts}
    found = dict[str, Tensor | None](dict.fromkeys(_names(world, model)))
    return found | assemble(world, {part: value for part, value in held.items() if value is not None})


def weights(world: World, model: Module) -> dict[str, Tensor]:
    """Copies of all parameters by name, whole; the masters of those that train."""
    held = {part: part.tensor for parts in (world.parts, world.stored) for part in parts}
    own = sorted({piece.name for part in held for piece in part.pieces})
    inside = {name for of_rank in _share(world, own) for name in of_rank}
    rest = {name: parameter for name, parameter in model.named_parameters() if name not in inside}
    if _alone(world):
        return assemble(world, held) | {name: _copy(parameter) for name, parameter in rest.items()}
    for name, parameter in rest.items():
        if not world.readable and parameter.numel():
            continue  # divided; what has no elements is in no part
        shape = tuple(parameter.shape)
        part = Part(parameter, "", (Piece(name, shape, 0, 0, parameter.numel(), world.boxes.get(name)),))
        held[part] = parameter
    found = assemble(world, held)
    return {name: found[name] for name in _names(world, model)}


def _names(world: World, model: Module) -> list[str]:
    """Every parameter of the whole model once, those of early ranks first."""
    own = [name for name, _ in model.named_parameters()]
    return list(dict.fromkeys(name for of_rank in _share(world, own) for name in of_rank))


def optimizer_state(world: World, optimizer: Optimizer) -> dict[str, Tensor]:
    """Copies of the optimizer's tensors as ``<parameter>/<key>``, whole."""
    states = {part: dict[str, Any](optimizer.state.get(part.tensor, {})) for part in world.parts}
    found: dict[str, Tensor] = {}
    for key in shared_keys(world, {key for state in states.values() for key in state}):
        values = {part: state[key] for part, state in states.items() if state.get(key) is not None}
        full = {part: value for part, value in values.items() if _like(value, part)}
        found |= {f"{name}/{key}": value for name, value in assemble(world, full).items()}
        single = {part: value for part, value in values.items() if part not in full}
        found |= {f"{name}/{key}": value for name, value in _singles(world, single).items()}
    return found


def assemble(world: World, values: Mapping[Part, Tensor]) -> dict[str, Tensor]:
    """Whole tensors by parameter name, on the CPU, from what every rank holds of them. Collective.

    ``values`` maps a part to a tensor laid out as its own. Ranks that hold the same elements must agree in every bit.
    """
    pieces: list[tuple[Piece, Any]] = []
    found: dict[str, Tensor] = {}
    for part, value in values.items():
        if isinstance(value, DTensor) or (part.whole and _alone(world)):
            found[part.pieces[0].name] = _copy(value)
        else:
            pieces += [(piece, _light(_copy(flat))) for piece, flat in part.slices(value.detach())]
    filled: dict[str, Tensor] = {}
    for piece, packed in (each for of_rank in _share(world, pieces) for each in of_rank):
        flat = torch.as_tensor(packed)
        whole = found.setdefault(piece.name, torch.zeros(piece.whole_shape, dtype=flat.dtype)).view(-1)
        mask = filled.setdefault(piece.name, torch.zeros(whole.numel(), dtype=torch.bool))
        at = places(piece)
        both = mask[at]
        assert torch.equal(whole[at][both], flat[both]), f"ranks hold unequal copies of '{piece.name}'"
        whole[at] = flat
        mask[at] = True
    assert all(bool(mask.all()) for mask in filled.values()), "elements that no rank holds"
    return found


def _light(tensor: Tensor) -> Any:
    """What is pickled many times as fast, where NumPy has the dtype."""
    return tensor if tensor.dtype == torch.bfloat16 else tensor.numpy()


def places(piece: Piece) -> slice | Tensor:
    """Where in the flattened whole parameter the elements of ``piece`` are."""
    stretch = slice(piece.start, piece.start + piece.length)
    if piece.box is None:
        return stretch
    index = torch.arange(math.prod(piece.whole_shape)).view(piece.whole_shape)
    rectangle = tuple(slice(at, at + size) for at, size in zip(piece.box.offset, piece.shape, strict=True))
    return index[rectangle].reshape(-1)[stretch]


def _alone(world: World) -> bool:
    """Whether every parameter is on this rank, whole."""
    return world.world_size == 1 or (world.parts.everyone is None and not world.boxes)


def shared_keys(world: World, keys: Collection[str]) -> list[str]:
    """Keys that any rank has, in one order on all."""
    return sorted({key for of_rank in _share(world, sorted(keys)) for key in of_rank})


def _singles(world: World, values: Mapping[Part, Any]) -> dict[str, Tensor]:
    own = {
        piece.name: _light(torch.as_tensor(value).detach().clone().cpu())
        for part, value in values.items()
        for piece in part.pieces
    }
    return {name: torch.as_tensor(value) for of_rank in _share(world, own) for name, value in of_rank.items()}


def _like(value: Any, part: Part) -> bool:
    return isinstance(value, Tensor) and value.shape == part.tensor.shape


def _copy(tensor: Tensor) -> Tensor:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().clone().cpu()


def _share(world: World, own: Any) -> list[Any]:
    """What every rank has to say; nothing is exchanged where all of it is here."""
    if _alone(world):
        return [own]
    everyone: list[Any] = [None] * world.world_size
    dist.all_gather_object(everyone, own)
    return everyone


def distance(one: Tensor, other: Tensor) -> float:
    """Relative L2 distance; 0 for two zeros, infinite for unequal shapes."""
    if one.shape != other.shape:
        return float("inf")
    wide_one, wide_other = one.double(), other.double()
    scale = float(torch.linalg.vector_norm(wide_other))
    gap = float(torch.linalg.vector_norm(wide_one - wide_other))
    return gap / scale if scale else gap
