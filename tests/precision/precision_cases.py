"""Recipes, models and optimizers that the tests of precision share."""

import torch

from camshaft.models.llama import Llama
from camshaft.plugin import Plugin, hookimpl

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
        "lr_schedule": {"type": "linear", "warmup_steps": 4, "min_lr_ratio": 0.1},
        "clip": {"max_norm": max_norm},
        "precision": precision,
    }


def factor(step, total):
    """What ``lr_schedule`` above must give, written anew."""
    return (step + 1) / 4 if step < 4 else 1.0 - 0.9 * (step - 4) / (total - 5)


def torch_adamw(fused, lr=LR):
    def build(model):
        matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
        vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=fused)

    return build


def change(model, frozen=(), unused=False):
    for name, parameter in model.named_parameters():
        if any(part in name for part in frozen):
            parameter.requires_grad_(False)
    if unused:
        model.unused = torch.nn.Parameter(torch.empty(7, 3, device="meta"))


class Variant(Plugin):
    """Owns ``build_model``: freezes, and adds a parameter that nothing uses."""

    def __init__(self, **changes):
        super().__init__()
        self.changes = changes

    @hookimpl
    def build_model(self, config):
        model = Llama(config)
        change(model, **self.changes)
        return model


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
