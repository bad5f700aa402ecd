"""AdamW with decoupled weight decay (Loshchilov & Hutter, arXiv:1711.05101), torch's fused form where there is one.

Weight decay applies to matrices and embeddings; norms and biases get none, by the role of a parameter, not by the
number of dimensions of whatever shard of it is at hand. Memory: two values a parameter, in the parameter's dtype.
Where another implementation was chosen for it (``world.ops.updates``), the coefficient of `clip` is a factor in its
update, and takes no pass of its own.
Claims nothing: any layout of parameters that keeps them element by element works.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

import camshaft

if TYPE_CHECKING:
    from torch.nn import Module
    from torch.optim import Optimizer

    from camshaft.hookspecs import Step
    from camshaft.state import State, World


class Options(camshaft.Options):
    """Hyperparameters of AdamW."""

    lr: Annotated[float, Field(gt=0)]
    """Peak learning rate; `lr_schedule` multiplies it."""
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [
        0.9,
        0.95,
    ]
    """Decay of the running means of the gradient and of its square."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled decay of matrices and embeddings; norms and biases get none."""
    decay_embeddings: bool = True
    """Whether embeddings decay too."""


class Plugin(camshaft.Plugin):
    """AdamW, fused where torch has it; no weight decay on norms and biases."""

    Options = Options
    draws = False
    usual: ClassVar[dict[str, str]] = {"optimizer": "{lr: 3e-4}"}

    @camshaft.hookimpl
    def plan(self) -> camshaft.Plan:
        """AdamW works element by element, so shards of any shape are fine; it keeps two values for each."""
        options = self.options
        problems: tuple[camshaft.Problem, ...] = ()
        if options.weight_decay == 0 and options.decay_embeddings and "decay_embeddings" in options.model_fields_set:
            problems = (
                camshaft.Problem(
                    "decay_embeddings does nothing without weight decay",
                    key=f"plugins.{self.name}.decay_embeddings",
                    fix=f"set plugins.{self.name}.weight_decay=0.1, or remove decay_embeddings",
                ),
            )
        return camshaft.Plan(provides=("elementwise_optimizer",), problems=problems, moments=2)

    @camshaft.hookimpl
    def optimizer(self, world: World, model: Module) -> Optimizer:
        """Two groups of the parameters that train: with decay and without."""
        from torch.optim import AdamW

        from camshaft.models.groups import decay_groups

        options = self.options
        groups = decay_groups(world.parts, options.weight_decay, decay_embeddings=options.decay_embeddings)
        beta1, beta2 = options.betas
        update = world.ops.updates.get("adamw")
        if update is None:
            return AdamW(groups, lr=options.lr, betas=(beta1, beta2), eps=options.eps, fused=True)
        from camshaft_adamw import optimizer

        world.scales_gradients = True
        return optimizer.AdamW(groups, update, lr=options.lr, betas=(beta1, beta2), eps=options.eps)

    @camshaft.hookimpl
    def around_step(self, state: State, call: Step) -> Step:
        """Give the clip coefficient to an optimizer that multiplies by it; else leave the step as it is."""
        optimizer: Any = state.optimizer
        if not state.world.scales_gradients:
            return call

        def step() -> None:
            optimizer.scale = state.gradient_scale
            call()

        return step
