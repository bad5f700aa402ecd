"""The promises of every Camshaft plugin: here the mean itself is compared too, on every layout and after a load."""

from __future__ import annotations

import torch

import camshaft.testing

DECAY = 0.75


class TestEma(camshaft.testing.Conformance):
    plugin = "ema"
    recipe = {"plugins": {"ema": {"decay": DECAY}, "adamw": {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.0}}}

    def reference_optimizer(self, model):
        return Averaging(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)


class TestEmaOfShards(TestEma):
    """Where flat shards of all parameters are averaged."""

    recipe = {"plugins": {"zero": {"stage": 3}, **TestEma.recipe["plugins"]}}


class TestEmaWithoutState(camshaft.testing.Conformance):
    """Beside an optimizer that keeps nothing."""

    plugin = "ema"
    recipe = {"plugins": {"ema": {"decay": DECAY}, "sgd": {"lr": 0.05}}}

    def reference_optimizer(self, model):
        return AveragingSGD(model.parameters(), lr=0.05)


class Mean:
    """A mean in plain words behind each step of a torch optimizer."""

    def step(self):
        super().step()
        for group in self.param_groups:
            for weight in group["params"]:
                self._average(weight)

    @torch.no_grad()
    def _average(self, weight):
        mean = self.state[weight].get("ema.weights")
        self.state[weight]["ema.weights"] = weight.clone() if mean is None else DECAY * mean + (1 - DECAY) * weight


class Averaging(Mean, torch.optim.AdamW):
    """AdamW with a mean."""


class AveragingSGD(Mean, torch.optim.SGD):
    """SGD with a mean."""
