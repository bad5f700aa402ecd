"""Gradient clipping by global norm (Pascanu et al., arXiv:1211.5063).

Invariant: the norm is that of the whole model's gradient, each parameter counted once whatever axes it is sharded or
replicated on. It is computed in fp32 or wider, stays on the device, and is the norm before clipping. The coefficient is
min(1, max_norm / (norm + 1e-6)), as in torch. Claims nothing. Traffic: one scalar for each mesh that shards gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

import camshaft

if TYPE_CHECKING:
    from torch import Tensor

    from camshaft.state import State


class Options(camshaft.Options):
    """How far gradients may reach."""

    max_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest global norm; null: measure the norm and change nothing."""


class Plugin(camshaft.Plugin):
    """Global gradient norm, and clipping by it."""

    Options = Options

    @camshaft.hookimpl
    def clip(self, state: State) -> Tensor:
        """Scale gradients in place; return the norm before."""
        from camshaft_clip.norm import clip_

        return clip_(state.world.parts, self.options.max_norm)
