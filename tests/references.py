"""What tests of parity share: optimizers of torch's beside their recipes, a schedule of rates, changed models."""

import torch

from camshaft.models.llama import Llama
from camshaft.plugin import Plugin, hookimpl

EXACT = {"gradients": 1e-12, "norm": 1e-12, "weights": 1e-12, "optimizer": 1e-12, "loss": 1e-12, "lr": 1e-15}
"""fp64: the noise of sums in another order is about 1e-15."""
FP32 = {"gradients": 1e-4, "norm": 2e-6, "weights": 1e-5, "optimizer": 1e-5, "loss": 2e-6, "lr": 1e-15}
"""Measured 2e-5 for gradients (of a parameter whose gradient nearly cancels), 9e-7 for optimizer state and weights,
2e-7 for norm and loss."""
ADAMW = {"adamw": {"lr": 3e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}}
SGD = {"sgd": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}}
LINEAR = {"lr_schedule": {"type": "linear", "warmup_steps": 4, "min_lr_ratio": 0.1}}


def linear(step, total):
    """What ``LINEAR`` must give, written anew."""
    return (step + 1) / 4 if step < 4 else 1.0 - 0.9 * (step - 4) / (total - 5)


def groups(model, decay):
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    return [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]


def torch_adamw(model):
    return torch.optim.AdamW(groups(model, 0.1), lr=3e-3, betas=(0.9, 0.95), eps=1e-8)


def torch_sgd(model):
    return torch.optim.SGD(groups(model, 0.01), lr=0.05, momentum=0.9)


OPTIMIZERS = {"adamw": (ADAMW, torch_adamw), "sgd": (SGD, torch_sgd)}


def change(model, frozen=(), unused=False):
    for name, parameter in model.named_parameters():
        if any(part in name for part in frozen):
            parameter.requires_grad_(False)
    if unused:
        model.unused = torch.nn.Parameter(torch.empty(7, 3, device="meta"))


class Variant(Plugin):
    """Owns ``build_model``: freezes, and adds parameters that nothing uses, as ``change`` does."""

    def __init__(self, change=change, **changes):
        super().__init__()
        self.change, self.changes = change, changes

    @hookimpl
    def build_model(self, config):
        model = Llama(config)
        self.change(model, **self.changes)
        return model
