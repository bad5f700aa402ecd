"""Units of storage: a flat buffer of parameters, this rank's stretch of it, and the master values that it updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from camshaft.models.init import fill_stretch, place
from camshaft.models.roles import initial_values, owned_parameters
from camshaft.parts import Part, Parts
from camshaft.stages import ONLY, Stages
from camshaft_zero.grid import Grid
from camshaft_zero.grouping import Group
from camshaft_zero.layout import Layout

if TYPE_CHECKING:
    from camshaft.comm import Pending
    from camshaft.parts import Box
    from camshaft.state import World


class Unit:
    """Parameters that travel together.

    ``full`` [layout.size] holds all of them in the policy's param dtype, and is None where parameters are divided;
    ``shard`` is this rank's stretch of it; ``master`` what this rank's optimizer updates, in the master dtype: a view
    of ``shard`` where the dtypes are equal. All of them get their gradients in the backwards of the same pipeline
    ``stages``.
    """

    def __init__(
        self, index: int, group: Group, model: Module, grid: Grid, world: World, divided: bool, stages: Stages = ONLY
    ) -> None:
        self.index, self.name, self.group, self.stages = index, group.name, group, stages
        self.modules = tuple(model.get_submodule(name) for name in group.modules)
        named = [(item.name, model.get_parameter(item.name), world.roles[item.name]) for item in group.items]
        self.layout = Layout(named, grid.divisor)
        self.trains = self.layout.members[0].parameter.requires_grad
        self.grid, policy, size = grid, world.policy, self.layout.size
        begin, end = grid.stretch(size)
        self.begin, self.end = grid.updated(size)
        self.full = None if divided else torch.zeros(size, dtype=policy.param, device=world.device)
        chunk = torch.zeros(end - begin, dtype=policy.param, device=world.device) if divided else None
        self.shard = self.full[begin:end] if chunk is None and self.full is not None else chunk
        assert self.shard is not None
        self._slice = self.shard[self.begin - begin : self.end - begin]
        narrow = self.trains and policy.master != policy.param
        self.master = self._slice.to(policy.master) if narrow else self._slice
        self.narrow = narrow
        self.pending: Pending | None = None
        """The gather of ``full`` that is under way."""

    @property
    def parameters(self) -> list[Parameter]:
        return [member.parameter for member in self.layout.members]

    def narrow_down(self) -> None:
        """Round the master values into the parameters."""
        if self.narrow:
            self._slice.copy_(self.master)

    def collect_slices(self, hook: str) -> Pending | None:
        """Start to gather ``shard`` from the ranks that update slices of it."""
        if not self.grid.divided:
            return None
        assert self.grid.outer is not None and self.shard is not None
        return self.grid.outer.all_gather(self.shard, self._slice, hook)

    def collect_stretches(self, hook: str) -> Pending | None:
        """Start to gather ``full`` from the ranks that hold stretches of it."""
        if self.full is None or self.grid.inner is None:
            return None
        assert self.shard is not None
        return self.grid.inner.all_gather(self.full, self.shard, hook)


def publish(units: Sequence[Unit], hook: str) -> None:
    """Make all copies and parameters follow from the master values, and wait for it."""
    for unit in units:
        unit.narrow_down()
    for step in (Unit.collect_slices, Unit.collect_stretches):
        for pending in [step(unit, hook) for unit in units]:
            if pending is not None:
                pending.wait()


def give_values(model: Module, units: Sequence[Unit], seed: int, boxes: Mapping[str, Box]) -> None:
    """First values of what this rank updates; the others' come with ``publish``. Needs one block besides the target.

    ``boxes``: which rectangles of whole parameters the model's are.
    """
    initial = {owned.name: initial_values(owned) for owned in owned_parameters(model)}
    for unit in units:
        for _, first, _, pieces in unit.layout.pieces(unit.begin, unit.end):
            for piece in pieces:
                at = first - unit.begin + piece.place
                target, first_values = unit.master[at : at + piece.length], initial[piece.name]
                box, start = boxes.get(piece.name), piece.start
                fill_stretch(target, piece.name, first_values, seed=seed, shape=piece.shape, start=start, box=box)


def give_storage(units: Sequence[Unit], device: torch.device) -> None:
    """Let every parameter be a view of its unit's buffer, or of nothing that can be used where it is divided."""
    for unit in units:
        assert unit.shard is not None
        for member in unit.layout.members:
            data = nothing(member.shape, unit.shard.dtype, device) if unit.full is None else member.view(unit.full)
            place(member.parameter, data, member.name)


def nothing(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of this shape without memory: whoever uses it gets NaN."""
    return torch.full((), float("nan"), dtype=dtype, device=device).expand(tuple(shape))


def make_parts(units: Sequence[Unit], grid: Grid, master: torch.dtype, device: torch.device) -> tuple[Parts, Parts]:
    """What the optimizer updates on this rank, and what is divided and does not train.

    A rank that holds nothing of a role has an empty part of it, so that data ranks have the same optimizer groups; one
    of whose pipeline stages nothing trains has an empty part all the same.
    """
    trained: list[Part] = []
    frozen: list[Part] = []
    for unit in units:
        for role, first, last, pieces in unit.layout.pieces(unit.begin, unit.end):
            tensor = Parameter(unit.master[first - unit.begin : last - unit.begin], requires_grad=unit.trains)
            (trained if unit.trains else frozen).append(Part(tensor, role, pieces))
    roles = {member.role for unit in units if unit.trains for member in unit.layout.members} or {"matrix"}
    for role in sorted(roles - {part.role for part in trained}):
        trained.append(Part(Parameter(torch.empty(0, dtype=master, device=device)), role, ()))
    return Parts(trained, grid.parts), Parts(frozen, grid.parts)
