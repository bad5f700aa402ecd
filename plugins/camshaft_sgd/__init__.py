"""Stochastic gradient descent with momentum (Polyak; Nesterov's form by option).

Useful where a proof must see the scale of gradients: AdamW hides a factor on all of them, SGD does not. Memory: one
value a parameter with momentum, none without. Claims nothing.
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
    """Hyperparameters of SGD."""

    lr: Annotated[float, Field(gt=0)]
    """Peak learning rate; `lr_schedule` multiplies it."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Part of the last update that the next one keeps."""
    nesterov: bool = False
    """Nesterov's momentum; needs `momentum` above 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decay of matrices and embeddings, added to the gradient; norms and biases get none."""


class Plugin(camshaft.Plugin):
    """SGD with momentum; no weight decay on norms and biases."""

    Options = Options
    draws = False

    @camshaft.hookimpl
    def plan(self) -> camshaft.Plan:
        """SGD works element by element; Nesterov without momentum would do nothing."""
        problems: tuple[camshaft.Problem, ...] = ()
        if self.options.nesterov and not self.options.momentum:
            problems = (
                camshaft.Problem(
                    "nesterov does nothing without momentum",
                    key=f"plugins.{self.name}.nesterov",
                    fix=f"set plugins.{self.name}.momentum=0.9, or remove nesterov",
                ),
            )
        moments = 1 if self.options.momentum else 0
        return camshaft.Plan(provides=("elementwise_optimizer",), problems=problems, moments=moments)

    @camshaft.hookimpl
    def optimizer(self, world: World, model: Module) -> Optimizer:
        """Two groups of the parameters that train: with decay and without."""
        import torch

        from camshaft.models.groups import decay_groups

        options = self.options
        groups = decay_groups(world.parts, options.weight_decay)
        sgd = torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum, nesterov=options.nesterov, fused=True)
        if options.momentum:
            from camshaft_sgd.late import fill_momentum

            sgd.register_step_pre_hook(fill_momentum)
        return sgd
