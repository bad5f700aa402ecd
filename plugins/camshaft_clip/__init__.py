"""Gradient clipping by global norm (Pascanu et al., arXiv:1211.5063).

Invariant: the norm is that of the whole model's gradient, each parameter counted once whatever axes it is sharded or
replicated on (data, tensor, pipeline): squares of what several ranks hold alike are divided by their number. It is
computed in fp32 or wider, stays on the device, is the norm before clipping, and is equal in every bit on all ranks. The
coefficient is min(1, max_norm / (norm + 1e-6)), as in torch; an optimizer that can multiply gradients on its way
(``world.scales_gradients``) gets it as ``state.gradient_scale``. Claims nothing. Traffic: one fp64 scalar over the
ranks that hold one copy of the model together, and one for each layout of gradients that are DTensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

import camshaft

if TYPE_CHECKING:
    from torch import Tensor

    from camshaft.state import State
    from camshaft_clip.norm import Clipper


class Options(camshaft.Options):
    """How far gradients may reach."""

    max_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest global norm; null: measure the norm and change nothing."""


class Plugin(camshaft.Plugin):
    """Global gradient norm, and clipping by it."""

    Options = Options
    draws = False
    _clipper: Clipper | None = None

    @camshaft.hookimpl
    def clip(self, state: State) -> Tensor:
        """Scale gradients in place, or leave that to an optimizer that does it on its way; return the norm before."""
        world, clipper = state.world, self._clipper
        if clipper is None or clipper.parts is not world.parts:  # libraries divide them as late as in their `bind`
            from camshaft_clip.norm import Clipper

            clipper = Clipper(
                world.parts,
                self.options.max_norm,
                master=world.policy.master,
                device=world.device,
                local=world.ops.grad_norm,
            )
            self._clipper = clipper
        norm = clipper.norm()
        coefficient = clipper.coefficient(norm)
        if coefficient is not None and world.scales_gradients:
            state.gradient_scale = coefficient
        elif coefficient is not None:
            clipper.scale(coefficient)
        return norm
