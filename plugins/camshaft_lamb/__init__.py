"""LAMB: Adam with a trust ratio for each parameter (You et al., arXiv:1904.00962, algorithm 2).

A parameter's update is scaled to a length of its own, ||w|| / ||u||, which lets batches grow very large. Norms and
biases are exempt by default, as in the paper's experiments: they get Adam's step and no decay.

Invariant: the norms are those of whole parameters, whatever lies where; a ratio is equal in every bit on all ranks that
hold a piece. Another implementation of the arithmetic (``world.ops.updates``) is taken where every parameter is whole
here, ``max_ratio`` is null, and exactly what decays has a ratio. Memory: two values a parameter in the master dtype,
and one more during the step. Traffic of a step: two fp64 numbers for each parameter (not element), in one all-reduce.
Requires ``parameter_sums``; claims nothing.
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
    """Hyperparameters of LAMB."""

    lr: Annotated[float, Field(gt=0)]
    """Peak learning rate; `lr_schedule` multiplies it."""
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    """Decay of the running means of the gradient and of its square."""
    eps: Annotated[float, Field(gt=0)] = 1e-6
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decay of matrices and embeddings, part of the update that the ratio scales; norms and biases get none."""
    exempt_vectors: bool = True
    """Whether norms and biases get Adam's step, without a trust ratio."""
    max_ratio: Annotated[float, Field(gt=0)] | None = 10.0
    """Largest trust ratio; null: no limit."""


class Plugin(camshaft.Plugin):
    """LAMB: a trust ratio for each parameter, for very large batches."""

    Options = Options
    draws = False

    @camshaft.hookimpl
    def plan(self) -> camshaft.Plan:
        """A trust ratio needs sums over whole parameters."""
        return camshaft.Plan(requires=("parameter_sums",), moments=2)

    @camshaft.hookimpl
    def optimizer(self, world: World, model: Module) -> Optimizer:
        """Two groups of what is updated: with decay and ratio, and norms and biases."""
        from camshaft_lamb.optimizer import Lamb, may_be_fused

        names = [name for name, _ in model.named_parameters()]
        update = world.ops.updates.get("lamb") if may_be_fused(world.parts, self.options) else None
        return Lamb(world.parts, names, world.device, self.options, update)
