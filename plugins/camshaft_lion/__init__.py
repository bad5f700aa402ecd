"""Lion: the sign of an interpolated momentum (Chen et al., arXiv:2302.06675, algorithm 2).

Each element moves by the learning rate, up or down, whatever the size of its gradient; so the rate is 3 to 10 times
smaller than AdamW's, and the weight decay as much larger. Invariant: works element by element, so any layout gives the
numbers of one process. Memory: one value a parameter in the master dtype, and one more during the step. No traffic.
Claims nothing.
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
    """Hyperparameters of Lion."""

    lr: Annotated[float, Field(gt=0)]
    """Peak learning rate, a third to a tenth of AdamW's; `lr_schedule` multiplies it."""
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [0.9, 0.99]
    """Parts of the momentum in the update, and in the next momentum."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.3
    """Decoupled decay of matrices and embeddings; norms and biases get none."""
    decay_embeddings: bool = True
    """Whether embeddings decay too."""


class Plugin(camshaft.Plugin):
    """Lion: moves by the sign of the momentum; half of AdamW's state."""

    Options = Options
    draws = False

    @camshaft.hookimpl
    def plan(self) -> camshaft.Plan:
        """Lion works element by element, so shards of any shape are fine."""
        return camshaft.Plan(provides=("elementwise_optimizer",), moments=1)

    @camshaft.hookimpl
    def optimizer(self, world: World, model: Module) -> Optimizer:
        """Two groups of what is updated: with decay and without."""
        from camshaft.models.groups import decay_groups
        from camshaft_lion.optimizer import Lion

        options = self.options
        groups = decay_groups(world.parts, options.weight_decay, decay_embeddings=options.decay_embeddings)
        beta1, beta2 = options.betas
        return Lion(groups, lr=options.lr, betas=(beta1, beta2))
