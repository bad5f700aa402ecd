"""Sparse gradients with error feedback (Stich et al., arXiv:1809.07599; Lin et al., arXiv:1712.01887).

Each data rank adds what it has not sent so far (its error) to its gradient, sends the k largest entries of each
parameter, and keeps the rest as its new error. All ranks sum the entries in the order of the ranks.

Invariant: after ``reduce`` all data ranks hold bit-equal gradients; what was sent and what is kept sum to what dense
gradients sum to. With ``ratio`` 1 the gradients are those of a dense sum. Memory: one value an element for the error
in the gradient's dtype, and one beside the optimizer's state. Traffic a rank and step, for N ranks and P elements:
(N-1) ratio P values and as many indexes of 8 bytes. Claims the reduction and the layout of gradients on ``dp``.

A checkpoint has the sum of all ranks' errors, as ``topk.error`` beside the optimizer's state, and each rank goes on
with an equal part of it: nothing that was not sent is lost, on however many ranks the run continues. So that a run
which saves and one that loads go the same way, saving hands out the errors alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

import camshaft
from camshaft import Claim, Plan, hookimpl

if TYPE_CHECKING:
    from camshaft.state import State
    from camshaft_topk.sparse import Sparse


class Options(camshaft.Options):
    """How much is sent."""

    ratio: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Part of each parameter's entries that a rank sends; at least one entry."""


class Plugin(camshaft.Plugin):
    """Sums the largest entries of gradients over the data ranks, and remembers the others."""

    Options = Options
    _sparse: Sparse | None = None

    @hookimpl
    def plan(self) -> Plan:
        """Own gradients and their sum on ``dp``."""
        return Plan(claims=(Claim("gradient.layout", "dp"), Claim("gradient.reduce", "dp")))

    @hookimpl
    def bind(self, state: State) -> None:
        """With one data rank there is nothing to send, and nothing is done."""
        from camshaft_topk.sparse import Sparse

        channel = state.world.mesh.channel(self.name, "dp")
        if channel is not None and state.world.mesh.degree("dp") > 1:
            self._sparse = Sparse(state, channel, self.options.ratio, f"{self.name}.error")

    @hookimpl
    def reduce(self) -> None:
        """Send, keep, and sum."""
        if self._sparse is not None:
            self._sparse.reduce()

    @hookimpl
    def post_step(self) -> None:
        """Once the optimizer has its own state, make room for the error beside it."""
        if self._sparse is not None:
            self._sparse.make_room()

    @hookimpl
    def post_load(self) -> None:
        """Take this rank's part of the saved errors."""
        if self._sparse is not None:
            self._sparse.take()

    @hookimpl
    def state_dict(self) -> Mapping[str, Any]:
        """A checkpoint is being made, on all ranks: put the errors where it takes tensors from."""
        if self._sparse is not None:
            self._sparse.give()
        return {}

    @hookimpl
    def load_state_dict(self, entries: Mapping[str, Any]) -> None:
        """The tensors come with the optimizer's."""
