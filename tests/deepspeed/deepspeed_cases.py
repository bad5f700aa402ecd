"""Recipes and references that the tests of the provider share."""

import torch

from camshaft.data import prepare
from camshaft.models.llama import Llama
from camshaft.plugin import Plugin, hookimpl
from camshaft.testing.reference import plain_run

# As for `ddp` (tests/parity): sums in another order. DeepSpeed's are no other than ours in fp32.
FP32 = {"gradients": 1e-4, "norm": 2e-6, "weights": 1e-5, "optimizer": 1e-5, "loss": 2e-6, "lr": 1e-15}
BF16 = {"gradients": 5e-2, "norm": 2e-3, "weights": 2e-3, "optimizer": 2e-2, "loss": 1e-4}
"""At a rate of 1e-3, against a plain bf16 model beside fp32 masters, whose whole window is one backward: a window of
three rounds its sums twice more (bf16 has 8 bits). Measured: gradients 2.4e-2 (of a parameter whose gradient nearly
cancels), norm 8e-4, weights 1e-3, moments 1.1e-2, loss 3.9e-5."""
ADAMW = {"adamw": {"lr": 3e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}}
SGD = {"sgd": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}}
BUCKET = 3000
"""Elements: several buckets even for this small model, and parameters larger than one."""


def groups(model, decay):
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    return [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]


def torch_adamw(model):
    return torch.optim.AdamW(groups(model, 0.1), lr=3e-3, betas=(0.9, 0.95), eps=1e-8)


def torch_slow(model):
    return torch.optim.AdamW(groups(model, 0.1), lr=1e-3, betas=(0.9, 0.95), eps=1e-8)


def torch_sgd(model):
    return torch.optim.SGD(groups(model, 0.01), lr=0.05, momentum=0.9)


SLOW = {"adamw": ADAMW["adamw"] | {"lr": 1e-3}}
OPTIMIZERS = {"adamw": (ADAMW, torch_adamw), "slow": (SLOW, torch_slow), "sgd": (SGD, torch_sgd)}


def linear(step, total):
    return (step + 1) / 4 if step < 4 else 1.0 - 0.9 * (step - 4) / (total - 5)


def plugins(stage=None, optimizer="adamw", precision=None, **options):
    """The plugins of a recipe; without a stage none that needs ranks."""
    small = {"reduce_bucket_size": BUCKET} if stage else {}
    return {
        **OPTIMIZERS[optimizer][0],
        "lr_schedule": {"type": "linear", "warmup_steps": 4, "min_lr_ratio": 0.1},
        "clip": {"max_norm": 0.1},
        "precision": precision or {"compute": "fp32"},
        "ddp": None,
        "deepspeed": None if stage is None else {"stage": stage, **small, **options},
    }


def reference(resolved, optimizer="adamw", compute="fp32", prepare_model=lambda model: None, parameters=None):
    return plain_run(
        resolved,
        prepare(resolved),
        OPTIMIZERS[optimizer][1],
        compute=compute,
        max_norm=0.1,
        factor=linear,
        prepare=prepare_model,
        parameters=parameters,
    )


class Variant(Plugin):
    """Owns ``build_model``: freezes, and adds a parameter that nothing uses."""

    def __init__(self, frozen=(), unused=False):
        super().__init__()
        self.frozen, self.unused = frozen, unused

    @hookimpl
    def build_model(self, config):
        model = Llama(config)
        change(model, self.frozen, self.unused)
        return model


def change(model, frozen, unused):
    for name, parameter in model.named_parameters():
        if any(part in name for part in frozen):
            parameter.requires_grad_(False)
    if unused:
        model.unused = torch.nn.Parameter(torch.empty(7, 3, device="meta"))
