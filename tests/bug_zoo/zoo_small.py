"""Bugs of optimizers, switches and checkpoints, and the models that show some of the others."""

from __future__ import annotations

from torch import Tensor, nn

from camshaft import Claim, Options, Plan, Plugin, hookimpl
from camshaft.models.layers import MLP
from camshaft.models.llama import Llama
from camshaft_adamw import Plugin as AdamW
from camshaft_checkpoint import Plugin as Checkpoint
from camshaft_recompute import Plugin as Recompute


class DecaysNorms(AdamW):
    """Weight decay of everything, also of norms and biases."""

    @hookimpl
    def optimizer(self, world, model):
        found = super().optimizer(world, model)
        for group in found.param_groups:
            group["weight_decay"] = self.options.weight_decay
        return found


class FusedOptions(Options):
    """A switch."""

    fused: bool = True
    """Take the fused kernels."""


class FusedFlag(Plugin):
    """Its switch is read, compared with what it never equals, and nothing comes of it."""

    Options = FusedOptions

    @hookimpl
    def plan(self) -> Plan:
        return Plan(claims=(Claim("module.implementation", target="*norm*"),))

    @hookimpl
    def close(self) -> None:
        pass


class ForgetsRandom(Recompute):
    """What runs again draws other random numbers than the first time."""

    @hookimpl
    def recompute(self, world, model) -> None:
        from camshaft_recompute.ambient import Ambient

        Ambient.settle = lambda ambient: setattr(ambient, "_before", None)  # in a process of verify's alone
        super().recompute(world, model)


class RepeatsSamples(Checkpoint):
    """A resumed run begins with the first sample again."""

    @hookimpl
    def load(self, state) -> bool:
        found = super().load(state)
        state.consumed_samples = 0
        return found


class DroppedMLP(MLP):
    """Dropout of the features inside."""

    def __init__(self, config, ops) -> None:
        super().__init__(config, ops)
        self.drop = nn.Dropout(0.3)

    def forward(self, hidden: Tensor) -> Tensor:
        features = self.ops.swiglu(self.gate_proj(hidden), self.up_proj(hidden))
        return self.down_proj(self.drop(features))


class WithDropout(Plugin):
    """No bug: the built-in decoder with dropout inside of its MLPs and behind them."""

    @hookimpl
    def build_model(self, world, config):
        model = Llama(config, world.ops)
        for layer in model.model.layers:
            layer.mlp = DroppedMLP(config, world.ops)
        return model


class WithUnused(Plugin):
    """No bug: the built-in decoder with a parameter that nothing uses."""

    @hookimpl
    def build_model(self, world, config):
        model = Llama(config, world.ops)
        model.unused = nn.Parameter(model.lm_head.weight.new_empty(7, 3))
        return model
