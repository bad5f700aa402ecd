"""A running mean of the weights (Polyak and Juditsky 1992; as in Karras et al., arXiv:2312.02696, equation 1).

After each step m <- decay m + (1 - decay) w, elementwise over what this rank updates (``world.parts``, the master
weights), so it is the same under every layout and is divided as the optimizer's state is. The mean begins with the
weights after the first step; a parameter that is never updated has none: its mean is itself. It is kept beside the
optimizer's state as ``ema.weights``, so every checkpoint has it, and another layout reads it.

Invariant: changes no number of the training. Memory: one value of the master dtype for each element that this rank
updates. Traffic: none. Claims nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

import camshaft
from camshaft import hookimpl

if TYPE_CHECKING:
    from camshaft.state import State


class Options(camshaft.Options):
    """How long the mean remembers."""

    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """Part of the mean that stays with each step."""


class Plugin(camshaft.Plugin):
    """A running mean of the weights."""

    Options = Options

    @hookimpl
    def post_step(self, state: State) -> None:
        """The weights are final; a skipped step has changed none, and counts for nothing."""
        from camshaft_ema.mean import average

        if not state.skipped:
            average(state.optimizer, state.world.parts.tensors, self.options.decay)
