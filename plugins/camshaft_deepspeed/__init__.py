"""ZeRO 0 to 3 by DeepSpeed (Rajbhandari et al., arXiv:1910.02054; offload: Ren et al., arXiv:2101.06840).

``deepspeed.initialize`` owns storage, reduction and step; optimizer, clipping, learning rate, checkpoints and tracking
stay with their plugins, which see DeepSpeed's flat tensors as parts. DeepSpeed is imported when a run is built.

Invariant: gradients are sums, as everywhere: DeepSpeed is told to sum (stages 0 to 2), or its average is multiplied
back (stage 3), and never divides by the accumulation. First values are those of every other row, in
master weights unrounded; a parameter that no rank used in a window has no gradient, is not updated, and gets no state.

With P parameters, N ranks and widths p, g (bytes of a parameter, a kept gradient) and 4 of each of the optimizer's k
values and of master weights, which DeepSpeed keeps beside fp32 parameters too: stage 0 as `ddp`; stage 1 takes
(p + g) P + 4 (k + 1) P/N; stage 2 p P + (g + 4 (k + 1)) P/N; stage 3 (p + g + 4 (k + 1)) P/N. Besides: a bucket of
``reduce_bucket_size`` elements, and P/N gradients in fp32 during the step. While stage 3 gets its first values a rank
holds its shards and one whole parameter. Sent a rank, times (N-1)/N, with M microbatches: stage 0 2 P; stage 1 3 P;
stage 2 (2 M + 1) P, since DeepSpeed reduces after each by all-reduce; stage 3 at most 3 M P. Once a window ranks
compare which parameters they used (2 bytes each): DeepSpeed's stages 1 to 3 need them alike.

Claims layout and reduction of gradients on ``dp``; from stage 1 the layout of what the optimizer updates, in stage 3
that of parameters, and this on ``tp`` and ``pp`` always, which it cannot share. Owns the slots ``materialize``,
``step`` and ``release``. The effective configuration of DeepSpeed is ``deepspeed.json`` in the run directory. This
module imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import camshaft
from camshaft.claims import Claim, Plan, PlanContext, Resource
from camshaft_deepspeed.options import Options, problems

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from camshaft.data.loader import Batch
    from camshaft.estimate import Estimate, Sizes
    from camshaft.hookspecs import Forward
    from camshaft.models.roles import Initial
    from camshaft.state import State, World
    from camshaft_deepspeed.engine import Engine
    from camshaft_deepspeed.runtime import Runtime

__all__ = ["Options", "Plugin"]


class Plugin(camshaft.Plugin):
    """Storage, reduction and step of ZeRO 0 to 3 by DeepSpeed."""

    Options = Options
    draws = False
    _runtime: Runtime | None = None
    _engine: Engine | None = None
    _config: dict[str, Any]
    _initial: dict[str, Initial]

    @camshaft.hookimpl
    def plan(self, context: PlanContext) -> Plan:
        """Own gradients on ``dp``, from stage 1 what the optimizer updates, in stage 3 parameters."""
        stage = self.options.stage
        resources: list[Resource] = ["gradient.layout", "gradient.reduce"]
        resources += ["optimizer.layout"] if stage >= 1 else []
        resources += ["parameter.layout"] if stage == 3 else []
        # DeepSpeed divides over all ranks there are: it can share them with nobody.
        others = (Claim("parameter.layout", axis) for axis in ("tp", "pp"))
        return Plan(
            claims=(*(Claim(resource, "dp") for resource in resources), *others),
            requires=("elementwise_optimizer",) if stage else (),
            provides=("reduced_gradients@dp",),
            problems=tuple(problems(self.options, context, f"plugins.{self.name}")),
        )

    @camshaft.hookimpl
    def estimate(self, context: PlanContext, sizes: Sizes) -> Estimate:
        """Model state and traffic by the formulas above."""
        from camshaft_deepspeed.bytes import estimate

        return estimate(self.options, sizes, context.mesh["dp"].degree)

    @camshaft.hookimpl
    def materialize(self, world: World, model: Module) -> None:
        """Prepare DeepSpeed and give parameters their first values, which in stage 3 are divided as they are made.

        Raises:
            RecipeError: the precision is none that DeepSpeed has.
            MachineError: offloading to nvme needs an extension that cannot be built here.
        """
        from camshaft_deepspeed.config import deepspeed_config, disk_folder, write
        from camshaft_deepspeed.material import first_values
        from camshaft_deepspeed.runtime import Runtime, check_disk, check_dtypes

        key = f"plugins.{self.name}"
        check_dtypes(self.options, world.policy, key)
        self._runtime = Runtime(world)
        self._config = deepspeed_config(
            self.options,
            world.policy,
            world.batch,
            gpu=world.device.type == "cuda",
            disk=disk_folder(self.options, world.run.path),
        )
        if world.is_main:
            write(self._config, world.run.path)
        check_disk(self.options, key)
        self._initial = first_values(model, world, self._config, self.options.stage)

    @camshaft.hookimpl
    def bind(self, state: State) -> None:
        """Hand model and optimizer to DeepSpeed."""
        from camshaft_deepspeed.divided import Divided
        from camshaft_deepspeed.replicated import Replicated

        state.world.scales_gradients = False  # DeepSpeed steps with an optimizer that knows nothing of it
        channel = state.world.mesh.channel(self.name, "dp")
        if self.options.stage == 0:
            self._engine = Replicated(state, self._config, channel)
        else:
            self._engine = Divided(state, self.options, self._config, self._initial, channel)

    @camshaft.hookimpl
    def around_forward(self, state: State, call: Forward) -> Forward:
        """Let the backward of each loss begin with DeepSpeed's prologue."""

        def forward(batch: Batch) -> Tensor:
            loss = call(batch)
            return self._bound().watch(loss)

        return forward

    @camshaft.hookimpl
    def post_backward(self) -> None:
        """DeepSpeed's epilogue of a backward."""
        self._bound().end_backward()

    @camshaft.hookimpl
    def reduce(self) -> None:
        """Show the reduced gradients in the parts."""
        self._bound().reduce()

    @camshaft.hookimpl
    def step(self) -> None:
        """DeepSpeed's step."""
        self._bound().step()

    @camshaft.hookimpl
    def release(self) -> None:
        """Drop gradients and what DeepSpeed would add to."""
        self._bound().release()

    @camshaft.hookimpl
    def post_load(self) -> None:
        """Make parameters of the master weights that were loaded."""
        self._bound().spread()

    @camshaft.hookimpl
    def close(self) -> None:
        """Take DeepSpeed's hooks off the model, and put its process-wide state back."""
        engine, runtime = self._engine, self._runtime
        self._engine = self._runtime = None
        try:
            if engine is not None:
                engine.close()
        finally:
            if runtime is not None:
                runtime.close()

    def _bound(self) -> Engine:
        assert self._engine is not None, "bind comes before every other call"
        return self._engine
