"""Adafactor without factorisation: no momentum, a bounded update (Shazeer & Stern, arXiv:1804.04235, sections 6 to 8).

One second moment an element, whose decay approaches 1 as the run goes on, instead of the paper's sums over rows and
columns: those save more memory, but are no longer computed element by element, so they do not live on shards.

Invariant: the update and its size are those of whole parameters, whatever lies where. Memory: one value a parameter in
the master dtype, and one more during the step. Traffic of a step: two fp64 numbers for each parameter (not element), in
one all-reduce; none with `clip_threshold: null` and `scale_by_weights: false`, where each element is on its own.
Requires ``parameter_sums``, or provides ``elementwise_optimizer``; claims nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

import camshaft

if TYPE_CHECKING:
    from torch.nn import Module
    from torch.optim import Optimizer

    from camshaft.state import World


class Options(camshaft.Options):
    """Hyperparameters of Adafactor."""

    lr: Annotated[float, Field(gt=0)]
    """Peak learning rate; `lr_schedule` multiplies it."""
    decay_exponent: Annotated[float, Field(gt=0, le=1)] = 0.8
    """The second moment decays by 1 - t^-decay_exponent in step t."""
    eps: Annotated[float, Field(gt=0)] = 1e-30
    """Added to the square of the gradient."""
    clip_threshold: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest root mean square of a parameter's update; null: no limit."""
    scale_by_weights: bool = False
    """Whether the rate is a part of the parameter's root mean square."""
    least_scale: Annotated[float, Field(gt=0)] = 1e-3
    """The root mean square that a smaller one counts as, with `scale_by_weights`."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled decay of matrices and embeddings; norms and biases get none."""
    decay_embeddings: bool = True
    """Whether embeddings decay too."""


class Plugin(camshaft.Plugin):
    """Adafactor without factorisation: half of AdamW's state, updates of bounded size."""

    Options = Options
    draws = False

    @camshaft.hookimpl
    def plan(self) -> camshaft.Plan:
        """Sizes of updates and weights are sums over whole parameters."""
        if self.options.clip_threshold is None and not self.options.scale_by_weights:
            return camshaft.Plan(provides=("elementwise_optimizer",), moments=1)
        return camshaft.Plan(requires=("parameter_sums",), moments=1)

    @camshaft.hookimpl
    def optimizer(self, world: World, model: Module) -> Optimizer:
        """Two groups of what is updated: with decay and without."""
        from camshaft_adafactor.optimizer import Adafactor

        names = [name for name, _ in model.named_parameters()]
        return Adafactor(world.parts, names, world.device, self.options)
