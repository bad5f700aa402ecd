"""The toy of ``checkpoint_toy`` with its parameters divided by axes of the model, and by data ranks inside of that.

``tp`` divides rectangles, unevenly (13 rows as 0, 2, 4 and 7), some held by two ranks of four, the rest by all; ``pp``
leaves each rank the parameters of its stage. Storage is whole, in flat buffers cut anywhere, or in masters beside the
model. Since sizes differ along ``tp``, flat buffers there cut the very same copy at other places.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from checkpoint_flat import ELSEWHERE, flat_optimizer, flat_parts
from checkpoint_toy import Run, Toy, gradient
from torch import Tensor, nn
from torch.nn import Parameter

from camshaft.build import roles
from camshaft.masters import whole_parts
from camshaft.mesh import Mesh, MeshShape
from camshaft.parts import Box, Part, Parts
from camshaft.recipe.schema import Parallel
from camshaft.testing.record import weights

DIVIDED = {"embed.weight": 0, "frozen.weight": 1, "low": 0, "wide": 2}
"""Dimension along which ``tp`` divides a parameter; the others are copied."""
SHARED = "low"
"""Has at most two rectangles, like key and value heads: with four ranks each is held by two."""
STAGES = {"embed.weight": 0, "up.weight": 0, "up.bias": 0, "scale": 0}
"""Stage of a parameter of two; 1 where nothing is said."""


@dataclass(frozen=True)
class Grid:
    """A layout: degrees along ``tp`` and ``pp``, and over how many data ranks storage is divided; 0: it is whole."""

    ranks: int
    tp: int = 1
    pp: int = 1
    shards: int = 0
    masters: bool = False


class GridRun(Run):
    """One rank of a toy run in a grid. ``held`` are the names of its parameters."""

    def __init__(
        self, path: Path, rank: int, grid: Grid, *, seed: int = 0, kind: str = "adamw", **options: Any
    ) -> None:
        super().__init__(path, rank, grid.ranks, model=Toy(seed), kind=kind, **options)
        world = self.state.world
        parallel = Parallel(tensor_parallel=grid.tp, pipeline_parallel=grid.pp)
        world.mesh = Mesh(MeshShape.of(parallel, grid.ranks), rank, None)
        place = world.mesh.place
        if grid.pp > 1:
            keep_stage(self.model, place["pp"])
            world.stages = {name: place["pp"] for name, _ in self.model.named_parameters()}
        if grid.tp > 1:
            world.boxes = keep_boxes(self.model, place["tp"], grid.tp)
        world.roles = roles(self.model)
        self._store(grid, place["dp"])
        for parts in (world.parts, world.stored):
            parts.attach(world.boxes)
            parts.everyone = ELSEWHERE
        self.state.optimizer = flat_optimizer(world.parts, kind)
        self.held = {name for name, _ in self.model.named_parameters()}

    def _store(self, grid: Grid, data: int) -> None:
        world = self.state.world
        named = [(name, value, world.roles[name]) for name, value in self.model.named_parameters()]
        if grid.shards:
            kinds = ([each for each in named if each[1].requires_grad is trains] for trains in (True, False))
            world.parts, world.stored = (
                Parts(flat_parts(each, data % grid.shards, grid.shards, None), ELSEWHERE) for each in kinds
            )
            world.readable = False
            _forget(parameter for _, parameter, _ in named)
            return
        live = whole_parts(self.model, world.roles)
        world.parts = live
        if grid.masters:
            world.parts = Parts(Part(Parameter(part.tensor.data.clone()), part.role, part.pieces) for part in live)
            _forget(live.tensors)

    def step(self) -> None:
        """One optimizer step of the elements that this rank holds."""
        state, idle = self.state, self.idle
        # Whoever reads weights here talks to all ranks; the gradient is one of the whole parameter.
        whole = weights(state.world, state.model)
        state.world.parts.isolate(idle, state.optimizer)
        for part in state.world.parts:
            if part.pieces and all(piece.name in idle for piece in part.pieces):
                continue
            grad = torch.zeros_like(part.tensor)
            for piece, flat in part.slices(grad):
                own = _rectangle(gradient(piece.name, whole[piece.name], state.step), piece.box, piece.shape)
                flat.copy_(own.reshape(-1)[piece.start : piece.start + piece.length])
            part.tensor.grad = grad
        state.optimizer.step()
        state.optimizer.zero_grad()
        self.count()


def _forget(parameters: Any) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.fill_(float("nan"))


def _rectangle(whole: Tensor, box: Box | None, shape: tuple[int, ...]) -> Tensor:
    if box is None:
        return whole
    return whole[tuple(slice(at, at + size) for at, size in zip(box.offset, shape, strict=True))]


def keep_stage(model: nn.Module, stage: int) -> None:
    """Remove the parameters of the other of two stages."""
    for name, _ in list(model.named_parameters(remove_duplicate=False)):
        home = STAGES["embed.weight"] if name == "head.weight" else STAGES.get(name, 1)
        if home != stage:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, None)


def keep_boxes(model: nn.Module, place: int, degree: int) -> dict[str, Box]:
    """Let each parameter be its rectangle for ``place`` of ``degree``."""
    found = {}
    for name, parameter in list(model.named_parameters()):
        box, local = _cut(name, parameter.data, place, degree)
        fresh = Parameter(local.clone(), requires_grad=parameter.requires_grad)
        for module in model.modules():
            for leaf, other in list(module.named_parameters(recurse=False)):
                if other is parameter:
                    setattr(module, leaf, fresh)
        found[name] = box
    return found


def _cut(name: str, whole: Tensor, place: int, degree: int) -> tuple[Box, Tensor]:
    shape = tuple(whole.shape)
    if name not in DIVIDED:
        return Box(shape, (0,) * len(shape), degree), whole
    dim, parts = DIVIDED[name], min(degree, 2) if name == SHARED else degree
    copies = degree // parts
    begin, end = (round(shape[dim] * (number / parts) ** 2.5) for number in (place // copies, place // copies + 1))
    offset = tuple(begin if number == dim else 0 for number in range(len(shape)))
    return Box(shape, offset, copies), whole.narrow(dim, begin, end - begin)
