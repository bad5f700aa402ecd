"""ZeRO 1, 2, 3 (Rajbhandari et al., arXiv:1910.02054) and hybrid sharding (Zhao et al., arXiv:2304.11277).

Parameters, gradients and the optimizer's values (master weights and moments) are each replicated or divided along a
data axis. Units of parameters lie in flat buffers, divided into one equal stretch a rank, whatever their shapes; what
the optimizer updates are this rank's stretches (``world.parts``), so that one fused call updates many parameters.

- Optimizer divided (stage 1): gradients are summed once a window, each rank updates its stretch, and updated parameters
  travel bucket by bucket while the next forward runs.
- Gradients too (stage 2): buckets are summed while backward goes on, and the full gradient is freed at once.
- Parameters too (stage 3): a unit is gathered just before its forward and its backward, and freed after each.

Where a rank has several pipeline stages, each unit is of one of them: a backward touches those of its own stage alone,
and their sums travel while others work. Tensor parallel leaves rectangles of parameters, which are divided likewise.

The engine has divided the loss by the global weight, so a gradient is a sum over ranks and microbatches: nothing is
averaged. Invariant: copies on different ranks are bit-equal after each step; padding is 0 and in no norm.

With P parameters, N ranks and widths p, g, m (bytes of a parameter, a kept gradient, the optimizer's values): stage 1
takes (p + g) P + m P/N, stage 2 p P + (g + m) P/N, stage 3 (p + g + m) P/N, beside two buffers of one bucket or unit
for each of what is freed. A window of one microbatch has in stage 1 three buckets and g P/N in place of g P. During a
forward there are no gradients but those that more are added to.

Sent a rank and window, times (N-1)/N: 2 P; stage 3 with M microbatches (2 M + 1) P, less what is kept between forward
and backward. ``reduce: each`` sends P for each microbatch instead of one.

Claims layout and reduction of gradients and the layout of the optimizer's values on ``dp``, and that of parameters
where they are divided; with ``provider: torch`` on ``tp`` and ``pp`` too, which it cannot share. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import camshaft
from camshaft.claims import Claim, Plan, PlanContext, Resource
from camshaft.halving import QUIET
from camshaft.plugin import hookimpl
from camshaft_zero.options import Options
from camshaft_zero.placement import Placement, refusals, resolve

if TYPE_CHECKING:
    from torch.nn import Module

    from camshaft.errors import Problem
    from camshaft.estimate import Estimate, Sizes
    from camshaft.hookspecs import Forward, Step
    from camshaft.state import State, World
    from camshaft_zero.provider import Storage

FACTS = ("reduced_gradients@dp", "parameter_sums", "whole_parameters")


class Plugin(camshaft.Plugin):
    """ZeRO 1, 2, 3 and hybrid sharding on flat buffers."""

    Options = Options
    draws = False

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self._storage: Storage | None = None

    @hookimpl
    def plan(self, context: PlanContext) -> Plan:
        """Own gradients and the optimizer's values on the data axis, and parameters where they are divided."""
        key = f"plugins.{self.name}"
        placement, problems = resolve(self.options, context.mesh.members("dp"), key)
        resources: list[Resource] = ["gradient.layout", "gradient.reduce", "optimizer.layout"]
        if placement is None:  # the axis has its owner all the same, so nobody says that it has none
            return Plan(claims=tuple(Claim(each, "dp") for each in resources), problems=tuple(problems))
        problems += refusals(self.options, placement, context, key)
        if placement.parameters or self.options.provider == "torch":
            resources.append("parameter.layout")
        claims = [Claim(resource, "dp") for resource in resources]
        if self.options.provider == "torch":  # it lays out whole parameters, and knows of no other axis
            claims += [Claim("parameter.layout", axis) for axis in ("tp", "pp")]
        return Plan(
            claims=tuple(claims),
            provides=(*FACTS, *((QUIET,) if self._quiet(placement, context) else ())),
            problems=tuple(problems),
        )

    def _quiet(self, placement: Placement, context: PlanContext) -> bool:
        """Whether nothing travels during forward and backward."""
        from camshaft_zero.costs import summed_each

        options: Options = self.options
        if context.mesh["dp"].degree == 1:
            return options.provider == "native"
        travels = options.overlap or placement.parameters or summed_each(options, placement)
        return options.provider == "native" and not travels

    @hookimpl
    def misfits(self, context: PlanContext, sizes: Sizes) -> Iterable[Problem]:
        """Asked to overlap one bucket with nothing. The run looks again, at whatever model it has."""
        from camshaft_zero.early import one_bucket

        placement, _ = resolve(self.options, context.mesh.members("dp"), f"plugins.{self.name}")
        if placement is None:
            return ()
        return one_bucket(self.options, placement, context, sizes, f"plugins.{self.name}")

    @hookimpl
    def estimate(self, context: PlanContext, sizes: Sizes) -> Estimate | None:
        """Bytes of the placement, and what it sends."""
        from camshaft_zero.costs import estimate

        placement, _ = resolve(self.options, context.mesh.members("dp"), f"plugins.{self.name}")
        return None if placement is None else estimate(self.options, placement, context, sizes)

    @hookimpl
    def shard_storage(self, world: World, model: Module) -> None:
        """`provider: torch` lays parameters out while they are on meta; flat buffers come with their values."""
        if self.options.provider == "torch":
            from camshaft_zero.peer import Peer

            self._storage = Peer(self.options, self._placement(world), world, model)

    @hookimpl
    def materialize(self, world: World, model: Module) -> None:
        """Flat buffers, their first values, and the parts that the optimizer updates."""
        if self._storage is None:
            from camshaft_zero.native import Native

            self._storage = Native(self.options, self._placement(world), world, model, self.name)
        self._storage.materialize(model)

    def _placement(self, world: World) -> Placement:
        placement, _ = resolve(self.options, world.mesh.shape.members("dp"), f"plugins.{self.name}")
        assert placement is not None, "plan refuses options without a placement"
        return placement

    def _bound(self) -> Storage:
        assert self._storage is not None, "materialize comes before every other call"
        return self._storage

    @hookimpl
    def bind(self, state: State) -> None:
        """Put hooks on parameters and modules."""
        self._bound().bind(state)

    @hookimpl
    def around_forward(self, state: State, call: Forward) -> Forward:
        """Wait for updated parameters that no module waits for."""
        return self._bound().around_forward(state, call)

    @hookimpl
    def post_backward(self) -> None:
        """Take gradients that did not fill a unit; free parameters that are still gathered."""
        self._bound().end_backward()

    @hookimpl
    def reduce(self, state: State) -> None:
        """Wait until every sum is there."""
        self._bound().reduce(state)

    @hookimpl
    def around_step(self, state: State, call: Step) -> Step:
        """Let the model's parameters follow what was updated."""
        storage = self._bound()

        def step() -> None:
            call()
            if not state.skipped:
                storage.publish()

        return step

    @hookimpl
    def post_load(self) -> None:
        """Let everything follow from the loaded master weights."""
        self._bound().refresh()

    @hookimpl
    def release(self, state: State) -> None:
        """Drop all gradients."""
        self._bound().release(state)

    @hookimpl
    def close(self, status: str) -> None:
        """Remove all hooks."""
        if self._storage is not None:
            self._storage.close(status == "finished")
            self._storage = None
