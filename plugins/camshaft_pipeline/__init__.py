"""Pipeline parallel: stages of the model on different ranks, driven by a schedule that is data.

Schedules: GPipe (Huang et al., arXiv:1811.06965), 1F1B (Harlap et al., arXiv:1806.03377) and interleaved 1F1B
(Narayanan et al., arXiv:2104.04473), ZB-H1 and ZBV (Qi et al., arXiv:2401.10241 and 2405.15362), DualPipeV
(DeepSeek-AI, arXiv:2412.19437, folded to a V), or a table of the recipe's own. Each is a pure function
(``schedules.make``) to a program for each rank, which is checked, can be simulated and drawn, and has one executor.

Invariant: gradients are those of one process, dropout too; each parameter is on one rank along ``pp``, and what
several stages use (a tied embedding) is updated by the first of them, whose values the others copy. Memory:
parameters, gradients and optimizer state of the rank's own stages, the copy of a tied parameter and its gradient, and
at most ``Schedule.peak`` microbatches' activations of a stage, with two more inputs on their way. Traffic a rank and
step: for each of m microbatches and each border to a stage of another rank one hidden state of b s h elements, and its
gradient back.
Claims the layout of parameters on ``pp``, and owns ``split`` and ``schedule``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar, get_args

import camshaft
from camshaft.program import Action, Kind
from camshaft_pipeline import options as sections
from camshaft_pipeline.planning import problems, schedule_of

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from camshaft.activations import Kept
    from camshaft.data.loader import Batch
    from camshaft.estimate import Estimate, Sizes
    from camshaft.hookspecs import Forward
    from camshaft.mesh import MeshShape
    from camshaft.models.shapes import ParameterShape
    from camshaft.state import State, World
    from camshaft_pipeline.cutting import Tie
    from camshaft_pipeline.deferral import Deferral
    from camshaft_pipeline.executor import Executor
    from camshaft_pipeline.outside import Outside
    from camshaft_pipeline.recording import Recorder
    from camshaft_pipeline.schedule import Schedule
    from camshaft_pipeline.ties import Ties


class Plugin(camshaft.Plugin):
    """Pipeline parallel: the model in stages, its schedule as data, checked and simulated."""

    Options = sections.Options
    draws = False
    usual: ClassVar[dict[str, str]] = {"pipeline_parallel": "{}"}
    taken: ClassVar[dict[str, tuple[str, ...]]] = {"schedule": get_args(sections.Name)}
    _executor: Executor | None = None
    _ties: Ties | None = None
    _deferral: Deferral | None = None
    _recorder: Recorder | None = None
    _outside: Outside | None = None
    _tied: tuple[Tie, ...] = ()

    @property
    def _chosen(self) -> sections.Options:
        chosen: sections.Options = self.options
        return chosen

    @camshaft.hookimpl
    def plan(self, context: camshaft.PlanContext) -> camshaft.Plan:
        """Own which parameters are on which rank along ``pp``; refuse schedules and splits that cannot be."""
        return camshaft.Plan(
            claims=(camshaft.Claim("parameter.layout", "pp"),), problems=problems(self._chosen, context)
        )

    @camshaft.hookimpl
    def shapes(
        self, context: camshaft.PlanContext, parameters: tuple[ParameterShape, ...], rank: int
    ) -> list[ParameterShape]:
        """The parameters of the rank's stages, and its copies of tied ones."""
        from camshaft_pipeline.shapes import shapes

        return shapes(self._chosen, context, parameters, rank)

    @camshaft.hookimpl
    def activations(self, context: camshaft.PlanContext, sizes: Sizes, kept: tuple[Kept, ...]) -> tuple[Kept, ...]:
        """Of how many microbatches each stage holds them, at the moment at which the rank holds most."""
        from camshaft_pipeline.costs import in_flight

        return in_flight(self._chosen, context, sizes, kept)

    @camshaft.hookimpl
    def estimate(self, context: camshaft.PlanContext, sizes: Sizes) -> Estimate:
        """Activations and their gradients between stages, and the schedule's bubble."""
        from camshaft_pipeline.costs import estimate

        return estimate(self._chosen, context, sizes)

    @camshaft.hookimpl
    def split(self, world: World, model: Module) -> Module:
        """Keep the modules of this rank's stages."""
        from camshaft_pipeline.cutting import cut

        placement = self._schedule(world.mesh.shape, world.batch.accumulation).placement
        self._tied = cut(world, model, self._chosen.split, placement)
        return model

    @camshaft.hookimpl
    def schedule(self, mesh: MeshShape, rank: int, microbatches: int) -> tuple[Action, ...]:
        """The checked program of ``rank``, with its transfers."""
        return self._schedule(mesh, microbatches).programs[mesh.coordinates(rank)["pp"]]

    def _schedule(self, mesh: MeshShape, microbatches: int) -> Schedule:
        return schedule_of(self._chosen, mesh["pp"].degree, microbatches)

    @camshaft.hookimpl
    def handlers(self, state: State) -> Mapping[Kind, Callable[[Action], None]]:
        """Run forwards, backwards and transfers."""
        from camshaft_pipeline.deferral import Deferral
        from camshaft_pipeline.executor import Executor
        from camshaft_pipeline.ties import Ties
        from camshaft_pipeline.transport import Line, Transport

        world = state.world
        schedule = self._schedule(world.mesh.shape, world.batch.accumulation)
        place = world.mesh.shape.coordinates(world.rank)["pp"]
        channel = world.mesh.channel(self.name, "pp")
        assert channel is not None
        channel.split_directions()
        program = schedule.programs[place]
        backwards = Counter(action.stage for action in program if action.kind in (Kind.B, Kind.I))
        leaves: dict[int, list[Tensor]] = {stage: [] for stage in schedule.stages_of(place)}
        for name, parameter in state.model.named_parameters():
            if parameter.requires_grad:
                leaves[world.stages[name]].append(parameter)
        self._deferral = Deferral(leaves, world.device)
        splits = any(action.kind is Kind.I for action in program)
        if splits:
            borrowing = [state.model.get_submodule(tie.module) for tie in self._tied if tie.user in leaves]
            self._deferral.watch(state.model, borrowing)
        self._ties = Ties(state, self._tied, schedule.placement, backwards)
        line = Line(channel, world.device, kept=None if self._chosen.table else 4)
        self._executor = Executor(state, schedule, Transport(schedule, place, line), self._ties, self._deferral)
        handlers = self._executor.handlers()
        if not self._chosen.trace:
            return handlers
        from camshaft_pipeline.recording import Recorder

        self._recorder = Recorder(state, schedule, self._executor)
        return self._recorder.around(handlers)

    @camshaft.hookimpl
    def around_forward(self, call: Forward) -> Forward:
        """In evaluation, where no program runs: pass each batch along the stages."""

        def forward(batch: Batch) -> Tensor:
            if batch.stage is not None or self._executor is None:
                if self._outside is not None:
                    self._outside.begin()
                return call(batch)
            return self._executor.evaluate(batch, call)

        return forward

    @camshaft.hookimpl
    def pre_run(self, state: State) -> None:
        """Watch the first window."""
        from camshaft_pipeline.outside import Outside

        self._outside = Outside(state.world, state.model, f"plugins.{self.name}")

    @camshaft.hookimpl
    def reduce(self) -> None:
        """Wait until everything that this window sent is gone; weights may change then."""
        assert self._executor is not None
        self._executor.end_window()
        if self._outside is not None:
            self._outside.close()
            self._outside = None

    @camshaft.hookimpl
    def post_step(self) -> None:
        """Draw the measured step, if this was it."""
        if self._recorder is not None:
            self._recorder.finish()

    @camshaft.hookimpl
    def close(self) -> None:
        """Remove the hooks, and what stands in the place of modules' forwards."""
        if self._ties is not None:
            self._ties.close()
        if self._deferral is not None:
            self._deferral.close()
        if self._outside is not None:
            self._outside.close()
        self._executor = self._ties = self._deferral = self._outside = None
