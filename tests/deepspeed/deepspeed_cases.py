"""Recipes and references that the tests of the provider share."""

import torch

import references
from camshaft.data import prepare
from camshaft.testing.reference import plain_run
from references import ADAMW, FP32, LINEAR, Variant, change, groups, linear

__all__ = ["BF16", "FP32", "Variant", "change", "plugins", "reference"]

BF16 = {"gradients": 5e-2, "norm": 2e-3, "weights": 2e-3, "optimizer": 2e-2, "loss": 1e-4}
"""At a rate of 1e-3, against a plain bf16 model beside fp32 masters, whose whole window is one backward: a window of
three rounds its sums twice more (bf16 has 8 bits). Measured: gradients 2.4e-2 (of a parameter whose gradient nearly
cancels), norm 8e-4, weights 1e-3, moments 1.1e-2, loss 3.9e-5."""
BUCKET = 3000
"""Elements: several buckets even for this small model, and parameters larger than one."""


def torch_slow(model):
    return torch.optim.AdamW(groups(model, 0.1), lr=1e-3, betas=(0.9, 0.95), eps=1e-8)


SLOW = {"adamw": ADAMW["adamw"] | {"lr": 1e-3}}
OPTIMIZERS = references.OPTIMIZERS | {"slow": (SLOW, torch_slow)}


def plugins(stage=None, optimizer="adamw", precision=None, **options):
    """The plugins of a recipe; without a stage none that needs ranks."""
    small = {"reduce_bucket_size": BUCKET} if stage else {}
    return {
        **OPTIMIZERS[optimizer][0],
        **LINEAR,
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
