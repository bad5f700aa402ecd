"""Activations that are made again in backward, or wait on the host, instead of being held on the device.

Chen et al. (arXiv:1604.06174) for whole modules (`full`); Korthikanti et al. (arXiv:2205.05198), section 5, for making
again what is cheap and large while matrix products are kept (`selective`), by kinds of operations or within a budget of
bytes; Rhu et al. (arXiv:1602.08124) for tensors that wait in the host's memory (`offload`).

Invariant: gradients are those without the plugin in every bit, because the second run of a module has the first one's
inputs, parameters, autocast and random numbers, and stops where backward has all that it needs; collectives inside of
it run again, on all ranks in one order. Memory of one microbatch, for L layers of s b tokens with h features in p
bytes: L s b h p in mode `full`, that and the products' results in `selective`, and one layer's activations while its
backward runs; a rank of a pipeline holds that of each microbatch that is under way. What of this is so in a run is
counted in its first microbatch and told in the log and as metrics (``saved_gib``, ``kept_gib``, ``extra_tflops``,
``extra_share``). What backward needs may not be written into before: writes in place are refused as autograd refuses
them, but those through ``tensor.data`` raise no version counter, so that neither autograd nor `offload` sees them, and
gradients are wrong in silence; write with ``torch.no_grad()`` instead. Traffic: that of the collectives that run again.
Claims ``module.recompute`` of the modules.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import camshaft
from camshaft_recompute.options import Options, problems

if TYPE_CHECKING:
    from torch.nn import Module

    from camshaft.activations import Kept
    from camshaft.estimate import Estimate, Sizes
    from camshaft.state import State, World
    from camshaft_recompute.runtime import Runtime

__all__ = ["Options", "Plugin"]
_logger = logging.getLogger("camshaft.recompute")


class Plugin(camshaft.Plugin):
    """Activations that are made again in backward, or kept elsewhere, instead of being held."""

    Options = Options
    draws = False
    _runtime: Runtime | None = None

    @camshaft.hookimpl
    def plan(self, context: camshaft.PlanContext) -> camshaft.Plan:
        """Own the recomputation of the modules, and refuse options that mean nothing together."""
        targets: Sequence[str] = self.options.modules or ("*",)
        claims = () if self.options.mode == "none" else targets
        return camshaft.Plan(
            claims=tuple(camshaft.Claim("module.recompute", "", target) for target in claims),
            problems=(*problems(self.options, self.name, context.plugins), *self._unknown(context)),
        )

    def _unknown(self, context: camshaft.PlanContext) -> Iterator[camshaft.Problem]:
        """What the options name and the built-in decoder lacks. Another model is looked at when it is built."""
        from camshaft.models.names import called_names
        from camshaft.models.stages import LLAMA
        from camshaft_recompute.naming import faults

        if self.options.mode != "none" and context.config is not None:
            patterns = self.options.modules or [f"{LLAMA.layers}.*"]
            yield from faults(called_names(context.config), patterns, self.options, f"plugins.{self.name}")

    @camshaft.hookimpl
    def activations(
        self, context: camshaft.PlanContext, sizes: Sizes, kept: tuple[Kept, ...]
    ) -> tuple[Kept, ...] | None:
        """Without what is made again, and with what is kept for that."""
        if self.options.mode == "none":
            return None
        from camshaft_recompute.table import changed

        return changed(self.options, context, sizes, kept)

    @camshaft.hookimpl
    def estimate(self, context: camshaft.PlanContext) -> Estimate | None:
        """Say what the plan does not count: who divides modules knows what they exchange, and not that it does so
        again.
        """
        from camshaft.estimate import Estimate

        divided = [axis.name for axis in context.mesh.axes if axis.degree > 1 and not axis.splits_batch]
        inside = [name for name in divided if name != "pp"]
        if self.options.mode not in ("full", "selective") or not inside:
            return None
        note = (
            f"What modules exchange along {' and '.join(inside)} in their forward, they exchange again when they are "
            "recomputed, up to the last tensor that backward needs; that is not in the bytes sent."
        )
        return Estimate(notes=(note,))

    @camshaft.hookimpl
    def recompute(self, world: World, model: Module) -> None:
        """Give each chosen module a forward that lets go of what it can make again."""
        if self.options.mode == "none":
            return
        from camshaft_recompute.runtime import Runtime

        self._runtime = Runtime(self.name, self.options, world, model)

    @camshaft.hookimpl
    def bind(self, state: State) -> None:
        """From now on it is known which microbatch runs."""
        if self._runtime is not None:
            self._runtime.bind(state)

    @camshaft.hookimpl
    def pre_forward(self) -> None:
        """The first microbatch is counted."""
        if self._runtime is not None:
            self._runtime.begin()

    @camshaft.hookimpl
    def post_reduce(self, state: State) -> None:
        """At the end of the first window: choose what fits the budget, and tell what is saved."""
        if self._runtime is not None and self._runtime.counting:
            for line in self._runtime.conclude(state):
                _logger.info(line)

    @camshaft.hookimpl
    def inert(self) -> str | None:
        """Nothing is saved: no module matches, or none of them has anything to let go of."""
        return None if self._runtime is None else self._runtime.inert

    @camshaft.hookimpl
    def close(self) -> None:
        """Give modules their forwards back."""
        if self._runtime is not None:
            self._runtime.close()
            self._runtime = None
