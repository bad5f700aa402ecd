"""Tensor parallel: matrix products divided over ``tp`` (Shoeybi et al., arXiv:1909.08053), with the sequence divided
between them (Korthikanti et al., arXiv:2205.05198).

A plan, the model's own and then the recipe's, gives modules a style (``camshaft_tensor_parallel.styles``). Each rank
has a box of every parameter, a plain tensor that starts from the values that one process gives it. Both tables and the
cross-entropy are divided by vocabulary, so no rank has full logits. Dropout, and other random numbers that modules draw
with functions of torch, are those of one process, or are refused in the first window.

Invariant: gradients, norm and weights are those of one process; what several ranks have is bit-equal on them.

With N ranks, L layers, T tokens of h values in a microbatch and P parameters: P/N parameters, beside norms, row biases
and shared key/value heads; activations inside of regions over N, and with ``sequence_parallel`` those between regions
too. Sent a rank and microbatch, times (N-1)/N: 2 (4 L + 2) T h + 6 T, as all-reduces, or as gathers and scatters with
``sequence_parallel``; in bf16 under bf16 autocast, but for the embedding's.

``async`` is made for links that work beside the processor, as GPUs have them. On a CPU the cores that multiply also
move the messages: measure before keeping it. Split backwards of a pipeline do not put its weight products off.

Claims the layout of parameters and of activations, and the sum of gradients, on ``tp``. This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ConfigDict, Field

import camshaft
from camshaft.claims import Claim, Plan, PlanContext
from camshaft.plugin import hookimpl

if TYPE_CHECKING:
    from torch.nn import Module

    from camshaft.activations import Kept
    from camshaft.data.loader import Batch
    from camshaft.estimate import Estimate, Sizes
    from camshaft.hookspecs import Forward
    from camshaft.models.shapes import ParameterShape
    from camshaft.state import State, World
    from camshaft_tensor_parallel.copies import Copies
    from camshaft_tensor_parallel.sharding import Sharding


class Options(camshaft.Options):
    """How products are divided."""

    model_config = ConfigDict(populate_by_name=True)

    sequence_parallel: bool = False
    """Divide the tokens between regions: norms and dropout work on a rank's own, and a gather and a scatter take the
    place of each sum over ranks."""
    overlap: bool = Field(False, alias="async")
    """Overlap gathers and scatters with the products next to them, in one chunk of tokens for each rank. Needs
    sequence_parallel; the numbers are the same. On a CPU, measure before keeping it."""
    plan: dict[str, str] = {}
    """Glob over module names to style, for a model's own modules; overrides the model's plan. Styles: region, column,
    shared, row, embedding, logits, loss, inner, outer."""


class Plugin(camshaft.Plugin):
    """Tensor and sequence parallel."""

    Options = Options
    draws = False
    usual: ClassVar[dict[str, str]] = {"tensor_parallel": "{}"}
    _sharding: Sharding | None = None
    _copies: tuple[Copies, ...] = ()

    @hookimpl
    def plan(self, context: PlanContext) -> Plan:
        """Own the model's parameters, what is between its layers and sums of copies' gradients, along ``tp``."""
        from camshaft_tensor_parallel.checks import problems

        resources: Any = ("parameter.layout", "activation.layout", "gradient.reduce")
        return Plan(
            claims=tuple(Claim(resource, "tp") for resource in resources),
            provides=("divided_tokens@tp",) if self.options.sequence_parallel else (),
            problems=tuple(problems(self.options, context, self.name)),
        )

    @hookimpl
    def shapes(
        self, context: PlanContext, parameters: tuple[ParameterShape, ...], rank: int
    ) -> Iterable[ParameterShape]:
        """Every parameter in the shape of its box."""
        from camshaft_tensor_parallel.shapes import shapes

        return shapes(self.options, context, parameters, rank)

    @hookimpl
    def activations(self, context: PlanContext, sizes: Sizes, kept: tuple[Kept, ...]) -> tuple[Kept, ...]:
        """Insides of regions divided over ranks, and with sequence parallel what is between them too."""
        from camshaft_tensor_parallel.kept import divided

        return divided(self.options, context, sizes, kept)

    @hookimpl
    def estimate(self, context: PlanContext, sizes: Sizes) -> Estimate:
        """Sums, or gathers and scatters, around each region."""
        from camshaft_tensor_parallel.costs import estimate

        return estimate(self.options, context, sizes)

    @hookimpl
    def shard_compute(self, world: World, model: Module) -> None:
        """Divide parameters and give modules forwards that exchange what is divided."""
        from camshaft_tensor_parallel.sharding import Sharding

        self._sharding = Sharding(self.options, world, model, self.name)

    @hookimpl
    def around_forward(self, state: State, call: Forward) -> Forward:
        """Tell the modules the batch's shape."""
        assert self._sharding is not None
        see = self._sharding.line.see

        def forward(batch: Batch) -> Any:
            see(batch.tokens)
            return call(batch)

        return forward

    @hookimpl
    def bind(self, state: State) -> None:
        """Find the copies whose gradients have to be summed."""
        assert self._sharding is not None
        self._copies = self._sharding.copies(state.world, state.model, self.name)

    @hookimpl
    def reduce_parts(self) -> None:
        """Sum the gradients of copies that each rank computed a part of; no forward of this window is run again."""
        for copies in self._copies:
            copies.sum()
        assert self._sharding is not None
        self._sharding.end_window()

    @hookimpl
    def close(self) -> None:
        """Give the modules their own forwards back."""
        if self._sharding is not None:
            self._sharding.close()
