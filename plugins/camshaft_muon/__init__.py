"""Muon: momentum whose matrix is orthogonalised before each step (Jordan et al. 2024; Liu et al., arXiv:2502.16982).

Hidden matrices get Muon; embeddings, the output head, norms and biases get AdamW, in the same plugin with options of
its own. A matrix is replaced by the nearest one whose singular values are all about 1, by Newton-Schulz iterations
(Jordan, "Muon: an optimizer for hidden layers in neural networks", 2024).

Invariant: momentum lives element by element where the storage puts it; what is orthogonalised is always the whole
matrix, so any layout gives the numbers of one process. Where matrices are divided over N ranks, each has one owner
rank, by cost; pieces of the momentum travel to it in rounds, and the result travels back, while other matrices are
being worked on; likewise along ``tp``, whose rectangles are put together there, and each copy sends and gets its own.
Without division every rank does all of the work, also where replicas could share it.

Memory: one value an element of a matrix, two of the rest, in the master dtype; and up to four times `round_mb` during
the step. Traffic of a step, each way: at most (N-1)/N elements of every matrix, in the dtype of the iteration; a matrix
that lies on its owner does not travel. Requires ``whole_parameters``; claims nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

import camshaft

if TYPE_CHECKING:
    from torch.nn import Module
    from torch.optim import Optimizer

    from camshaft.state import World

Fraction = Annotated[float, Field(ge=0, lt=1)]


class AdamW(camshaft.Options):
    """AdamW for what is no hidden matrix."""

    lr: Annotated[float, Field(gt=0)] = 3e-4
    """Peak learning rate; `lr_schedule` multiplies it."""
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    """Decay of the running means of the gradient and of its square."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled decay of embeddings and of matrices that are not hidden; norms and biases get none."""


class Options(camshaft.Options):
    """Hyperparameters of Muon."""

    lr: Annotated[float, Field(gt=0)]
    """Peak learning rate of hidden matrices; `lr_schedule` multiplies it."""
    momentum: Fraction = 0.95
    """Part of the last momentum that the next one keeps."""
    nesterov: bool = True
    """Whether the gradient is mixed with the momentum once more before it is orthogonalised."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled decay of hidden matrices."""
    scaling: Literal["original", "match_rms_adamw"] = "match_rms_adamw"
    """Factor on `lr` for a matrix of m rows and n columns: sqrt(max(1, m/n)), or 0.2 sqrt(max(m, n)), which gives
    updates the size of AdamW's, so that its learning rate and decay fit (arXiv:2502.16982)."""
    iterations: Annotated[int, Field(ge=1, lt=100)] = 5
    """Newton-Schulz iterations."""
    iteration_dtype: Literal["auto", "bf16", "fp32", "fp64"] = "auto"
    """Dtype of the iterations and of what travels; `auto`: the masters' dtype, but bf16 on GPUs that are fast at it."""
    exclude: list[str] = ["*lm_head*"]
    """Globs over names of matrices that get AdamW instead: an output head of its own should."""
    adamw: AdamW = AdamW()
    """AdamW for everything else: embeddings, output head, norms, biases."""
    round_mb: Annotated[float, Field(gt=0, le=2**20)] = 256.0
    """MiB of whole matrices that a rank owns in one round of the exchange, or one larger matrix."""


class Plugin(camshaft.Plugin):
    """Muon: orthogonalised momentum for hidden matrices, AdamW for the rest."""

    Options = Options
    draws = False

    @camshaft.hookimpl
    def plan(self, context: camshaft.PlanContext) -> camshaft.Plan:
        """Newton-Schulz needs whole matrices."""
        from camshaft_muon.memory import moments
        from camshaft_muon.naming import faults

        exclude, config = self.options.exclude, context.config
        usual = exclude == Options.model_fields["exclude"].default
        explicit = "exclude" in self.options.model_fields_set
        return camshaft.Plan(
            requires=("whole_parameters",),
            moments=moments(context.recipe) if usual else None,
            problems=tuple(faults(config, exclude, f"plugins.{self.name}.exclude")) if config and explicit else (),
        )

    @camshaft.hookimpl
    def optimizer(self, world: World, model: Module) -> Optimizer:
        """Three groups: hidden matrices, then the rest with decay and without.

        Raises:
            RecipeError: there is no hidden matrix, or an explicit pattern of ``exclude`` matches nothing.
        """
        from camshaft_muon.choice import candidates
        from camshaft_muon.naming import nothing_left
        from camshaft_muon.optimizer import Muon

        options, key = self.options, f"plugins.{self.name}.exclude"
        names = candidates(world, model, options.exclude, "exclude" in options.model_fields_set, key)
        optimizer = Muon(world, names, options)
        if not optimizer.hidden and world.mesh.degree("pp") == 1:  # the others may have some
            raise camshaft.RecipeError(nothing_left(key))
        return optimizer
