"""Recipes, models and optimizers that the tests of precision share."""

import torch

from references import LINEAR, Variant, change, groups
from references import linear as factor

__all__ = ["Variant", "change", "factor"]

MAX_NORM, LR, DECAY = 0.1, 3e-3, 0.1
VARIED = {
    "tie_word_embeddings": False,
    "attention_bias": True,
    "qk_norm": True,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
"""Changes to the model of ``make_recipe`` that bring in every other kind of parameter."""


def plugins(max_norm=MAX_NORM, lr=LR, **precision):
    return {
        "adamw": {"lr": lr, "betas": [0.9, 0.95], "weight_decay": DECAY},
        **LINEAR,
        "clip": {"max_norm": max_norm},
        "precision": precision,
    }


def torch_adamw(fused, lr=LR):
    def build(model):
        return torch.optim.AdamW(groups(model, DECAY), lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=fused)

    return build


def overall(records, reference):
    """Worst deviation of each kind over all steps, of all parameters together; of skipped steps, not of gradients.

    Tensors by relative L2 distance, of all parameters joined: under Adam a single parameter whose gradient nearly
    cancels (a bias of keys) moves by the sign of noise. Names, and which have a gradient, must be equal.
    """
    worst = dict.fromkeys(("gradients", "weights", "exp_avg", "exp_avg_sq", "norm", "loss"), 0.0)
    for got, wanted in zip(records, reference, strict=True):
        assert (got.norm is None) == (wanted.norm is None), f"step {got.step} was skipped on one side only"
        found = {"weights": joined(got.weights, wanted.weights), "loss": abs(got.loss - wanted.loss) / wanted.loss}
        for key in ("exp_avg", "exp_avg_sq"):
            found[key] = joined(got.optimizer, wanted.optimizer, f"/{key}")
        if wanted.norm is not None:
            found["gradients"] = joined(got.gradients, wanted.gradients)
            found["norm"] = abs(got.norm - wanted.norm) / wanted.norm
        for key, value in found.items():
            assert value == value, f"step {got.step}: {key} is NaN"
            worst[key] = max(worst[key], value)
    return worst


def joined(got, wanted, suffix=""):
    """Relative L2 distance of two sets of tensors, each as one long vector."""
    assert {name for name in got if got[name] is not None} == {name for name in wanted if wanted[name] is not None}
    names = [name for name in wanted if name.endswith(suffix) and wanted[name] is not None]
    one, other = (
        torch.cat([side[name].double().flatten() for name in names or []] or [torch.zeros(1)]) for side in (got, wanted)
    )
    scale = float(other.norm())
    return float((one - other).norm()) / scale if scale else float(one.norm())


def assert_under(worst, bounds):
    over = {key: (worst[key], bound) for key, bound in bounds.items() if not worst[key] <= bound}
    assert not over, f"(found, bound): {over}"
