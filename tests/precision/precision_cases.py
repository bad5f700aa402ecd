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


class Records(Plugin):
    """Keeps every log record."""

    def __init__(self):
        super().__init__()
        self.records = []

    @hookimpl
    def log(self, record):
        self.records.append(dict(record))
