"""The native provider: flat buffers, built in ``materialize`` and run by the hooks of the step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch.nn import Module, ModuleList, Parameter

from camshaft.errors import Problem, RecipeError
from camshaft.models.init import materialize
from camshaft.parts import Part
from camshaft.stages import Stages, stages_of
from camshaft_zero import naming
from camshaft_zero.costs import summed_each
from camshaft_zero.gatherer import Gatherer
from camshaft_zero.grid import Grid
from camshaft_zero.grouping import Group, Item, buckets, by_module, holders, piece, settle_nesting
from camshaft_zero.provider import Storage
from camshaft_zero.publisher import Publisher
from camshaft_zero.reducer import Reducer
from camshaft_zero.storage import Unit, give_storage, give_values, make_parts, publish

if TYPE_CHECKING:
    from torch import Tensor

    from camshaft.data.loader import Batch
    from camshaft.hookspecs import Forward
    from camshaft.state import State, World
    from camshaft_zero.options import Options
    from camshaft_zero.placement import Placement

WHOLE_AT_END = 2**30
"""Bytes up to which divided parameters are put together on every rank when a run has finished, to sample from."""


class Native(Storage):
    """Everything that the plugin keeps in a run."""

    def __init__(self, options: Options, placement: Placement, world: World, model: Module, plugin: str) -> None:
        self._options, self._placement, self._world, self._plugin = options, placement, world, plugin
        self.grid = Grid(world, placement, plugin)
        self.divided = placement.parameters and self.grid.inner is not None
        self._owners: dict[str, list[Module]] = {
            item.name: [model.get_submodule(piece(name, world.pieces)) for name in holders(item)]
            for items in items_of(model)
            for item in items
        }
        self.units = self._make_units(model)
        self._trained = [unit for unit in self.units if unit.trains]
        self._names: set[str] = set()
        self._reducer: Reducer | None = None
        self._gatherer: Gatherer | None = None
        self._publisher: Publisher | None = None
        self._held: list[tuple[Part, Unit, int]] = []

    def _make_units(self, model: Module) -> list[Unit]:
        """Units of one pipeline stage each; of a rank's several stages those come first that forward uses first."""
        world, options = self._world, self._options
        trained, frozen = (by_stage(items, stages_of(model, world.stages), model) for items in items_of(model))
        size = world.policy.param.itemsize
        groups: list[tuple[Group, Stages]] = []
        if self.divided:
            lists = [name for name, module in model.named_modules() if isinstance(module, ModuleList)]
            least = int(options.unit_size_mb * 2**20 / size)
            if not world.stages:  # a rank of a pipeline has some of the model's modules
                self._check_patterns(model)
            for sets in (trained, frozen):
                made = [
                    (each, own) for own, items in sets.items() for each in by_module(items, lists, options.units, least)
                ]
                settle_nesting(made)
                groups += made
        else:
            for stages, items in reversed(trained.items()):  # in the order of backward, as buckets are
                groups += [(group, stages) for group in buckets(items, options.bucket_size_mb, size)]
            self._check_overlap([group for group, _ in groups], size)
        self._join_pieces([group for group, _ in groups])
        return [
            Unit(index, group, model, self.grid, world, self.divided, stages)
            for index, (group, stages) in enumerate(groups)
        ]

    def _join_pieces(self, groups: list[Group]) -> None:
        """Modules inside of one that was compiled are not called: it is called in their place.

        Raises:
            RecipeError: a unit is to be gathered inside of such a module.
        """
        for group in groups:
            modules = list(dict.fromkeys(piece(name, self._world.pieces) for name in group.modules))
            if self.divided and modules != group.modules:
                inner = next(name for name in group.modules if name not in modules)
                outer = piece(inner, self._world.pieces)
                raise RecipeError(naming.inside(inner, outer, f"plugins.{self._plugin}"))
            group.modules = modules

    def _check_patterns(self, model: Module) -> None:
        """Refuse a pattern of units that chooses nothing."""
        names = [name for name, module in model.named_modules() if any(True for _ in module.parameters())]
        problems = tuple(naming.idle(names, self._options.units or (), f"plugins.{self._plugin}"))
        if problems:
            raise RecipeError(problems)

    def _check_overlap(self, groups: list[Group], itemsize: int) -> None:
        """Refuse to overlap one bucket with nothing, where that was asked for."""
        options = self._options
        if "overlap" in options.model_fields_set and options.overlap and len(groups) == 1 and not self.grid.alone:
            size = groups[0].elements * itemsize / 2**20
            raise RecipeError(
                Problem(
                    f"there is nothing to overlap: all gradients fit into one bucket, of {size:.3g} MiB",
                    key=f"plugins.{self._plugin}.overlap",
                    fix=f"lower plugins.{self._plugin}.bucket_size_mb, or remove overlap",
                )
            )

    def materialize(self, model: Module) -> None:
        """First values: this rank makes what it updates, the rest comes from the ranks that have it."""
        world = self._world
        inside = {member.name for unit in self.units for member in unit.layout.members}
        rest = {name for name, _ in model.named_parameters()} - inside
        dtype, boxes = world.policy.param, world.boxes
        materialize(model, seed=world.recipe.seed, device=world.device, dtype=dtype, only=rest, boxes=boxes)
        give_values(model, self.units, world.recipe.seed, boxes)
        give_storage(self.units, world.device)
        publish(self.units, "materialize")
        world.parts, world.stored = make_parts(self.units, self.grid, world.policy.master, world.device)
        world.readable, world.settle = not self.divided, self.settle

    def bind(self, state: State) -> None:
        """Put hooks on parameters and modules."""
        options = self._options
        each = summed_each(options, self._placement)
        self._reducer = Reducer(state, self.grid, self._trained, each=each, overlap=options.overlap, paced=self.divided)
        if self.divided:
            prefetch, reshard = options.prefetch if options.overlap else 0, options.reshard_after_forward
            self._gatherer = Gatherer(state, self.units, self.grid, reshard=reshard, prefetch=prefetch)
            self._reducer.completed = self._gatherer.completed
            self._gatherer.over = self._reducer.over
        else:
            in_order = sorted(self._trained, key=lambda unit: -unit.index)  # buckets were made in backward's order
            self._publisher = Publisher(in_order, self.grid, options.overlap)
            self._publisher.reached_last = self._reducer.end_forward
        self._hold(state)

    def _hold(self, state: State) -> None:
        """Find for each part the unit whose master values it is a view of, and where."""
        units: dict[int, list[Unit]] = {}
        for unit in self._trained:
            units.setdefault(unit.master.untyped_storage().data_ptr(), []).append(unit)
        self._held = []
        for part in state.world.parts:
            if not part.pieces:
                continue
            at = int(part.tensor.storage_offset())
            for unit in units[part.tensor.untyped_storage().data_ptr()]:
                begin = at - int(unit.master.storage_offset())
                if 0 <= begin < unit.master.numel():
                    self._held.append((part, unit, begin))
        self._where = {unit: index for index, unit in enumerate(self._trained)}

    def around_forward(self, state: State, call: Forward) -> Forward:
        """Wait for what no module waits for."""

        def forward(batch: Batch) -> Tensor:
            if self._publisher is None:
                made = call(batch)
            else:
                self._publisher.before_forward()
                with self._publisher.watch_forward():
                    made = call(batch)
            assert self._reducer is not None
            self._reducer.end_forward()
            return made

        return forward

    def end_backward(self) -> None:
        """After the backward of a microbatch."""
        assert self._reducer is not None
        self._reducer.end_backward()
        if self._gatherer is not None:
            self._gatherer.end_backward()

    def reduce(self, state: State) -> None:
        """Finish all sums, and give each part its gradient; parameters that nobody used have none."""
        assert self._reducer is not None
        if self._publisher is not None:
            self._publisher.learn(self._holders)
        unused = self._reducer.finish()
        if unused:
            state.world.parts.isolate(unused, state.optimizer)
            self._hold(state)
        gradients = {unit: self._reducer.gradient(self._where[unit]) for unit in self._trained}
        for part, unit, begin in self._held:
            idle = bool(unused) and all(piece.name in unused for piece in part.pieces)
            stretch = gradients[unit][begin : begin + part.tensor.numel()]
            part.tensor.grad = None if idle else stretch

    def _holders(self, unit: Unit) -> list[list[Module]]:
        return [self._owners[member.name] for member in unit.layout.members]

    def release(self, state: State) -> None:
        """Drop all gradients."""
        assert self._reducer is not None
        for part in state.world.parts:
            part.tensor.grad = None
        self._reducer.release()

    def publish(self) -> None:
        """After the optimizer: every copy follows, now or while the next forward runs."""
        if self._publisher is not None:
            self._publisher.start()
        else:
            self.refresh()

    def refresh(self) -> None:
        """Make everything follow from the master values, and wait for it."""
        self.settle()
        if self._gatherer is not None:
            self._gatherer.forget()
        publish(self.units, "step")

    def settle(self) -> None:
        """Wait until every parameter that is not divided can be read."""
        if self._publisher is not None:
            self._publisher.settle()

    def close(self, finished: bool) -> None:
        """Remove all hooks; after a run that finished, put a model that is not too large together again."""
        for each in (self._reducer, self._publisher):
            if each is not None:
                each.close()
        if self._gatherer is not None:
            self._gatherer.forget()
            self._gatherer.close()
            size = sum(unit.layout.size * unit.shard.element_size() for unit in self.units if unit.shard is not None)
            if finished and size <= WHOLE_AT_END:
                self._put_together()

    def _put_together(self) -> None:
        for unit in self.units:
            assert self.grid.inner is not None and unit.shard is not None
            full = unit.shard.new_empty(unit.layout.size)
            self.grid.inner.all_gather(full, unit.shard, "close").wait()
            for member in unit.layout.members:
                member.parameter.data = member.view(full)
        self._world.readable = True


def items_of(model: Module) -> tuple[list[Item], list[Item]]:
    """Parameters that train, and frozen ones; tied ones once, with all their names, empty ones not at all."""
    names: dict[Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    items = [(p, Item(own[0], p.numel(), tuple(own))) for p, own in names.items() if p.numel()]
    return [item for p, item in items if p.requires_grad], [item for p, item in items if not p.requires_grad]


def by_stage(items: Iterable[Item], stages: Mapping[Parameter, Stages], model: Module) -> dict[Stages, list[Item]]:
    """``items`` by the pipeline stages that use them: those of several first, then stage by stage."""
    found: dict[Stages, list[Item]] = {}
    for item in items:
        found.setdefault(stages[model.get_parameter(item.name)], []).append(item)
    return {each: found[each] for each in sorted(found, key=lambda each: (len(each) == 1, min(each)))}
