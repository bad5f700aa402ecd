"""What the tests of tensor parallel share: recipes, the plain reference, and the bounds."""

import torch

from camshaft.data import prepare
from camshaft.testing.compare import assert_bit_equal, assert_within, compare
from camshaft.testing.reference import plain_run
from camshaft.testing.run import record_ranks

FP64 = {"gradients": 1e-12, "norm": 1e-12, "weights": 1e-12, "optimizer": 1e-12, "loss": 1e-12, "lr": 1e-15}
MODEL = {
    "vocab_size": 259,
    "hidden_size": 16,
    "intermediate_size": 22,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
}
STEPS = 4


def recipe(make_recipe, degree=2, *, data=1, tensor=None, optimizer="adamw", compute="fp64", plugins=None, **model):
    """``tensor``: options of the plugin; None leaves it out, for the reference."""
    settings = {
        "adamw": {"adamw": {"lr": 3e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}},
        "sgd": {"sgd": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}},
    }
    chosen = {**settings[optimizer], "clip": {"max_norm": 0.1}, "precision": {"compute": compute}, **(plugins or {})}
    sections = {}
    if tensor is not None:
        chosen["tensor_parallel"] = tensor
        sections["parallel"] = {"tensor_parallel": degree}
    if data == 1 or tensor is None:
        chosen["ddp"] = None
    return make_recipe(
        chosen,
        data * degree if tensor is not None else 1,
        model=MODEL | model,
        batch={"micro_batch_size": 4 // data, "global_batch_size": 12},
        training={"max_steps": STEPS, "log_every": 1},
        **sections,
    )


def groups(model, decay):
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    return [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]


OPTIMIZERS = {
    "adamw": lambda model: torch.optim.AdamW(groups(model, 0.1), lr=3e-3, betas=(0.9, 0.95), eps=1e-8),
    "sgd": lambda model: torch.optim.SGD(groups(model, 0.01), lr=0.05, momentum=0.9),
}


def reference(make_recipe, *, optimizer="adamw", compute="fp64", prepare_model=lambda model: None, **model):
    resolved = recipe(make_recipe, optimizer=optimizer, compute=compute, **model)
    return plain_run(
        resolved,
        prepare(resolved),
        OPTIMIZERS[optimizer],
        compute=compute,
        max_norm=0.1,
        prepare=prepare_model,
    )


def check(ranks, wanted, bounds=FP64):
    """All ranks alike in every bit, and within ``bounds`` of the reference."""
    assert len(wanted) == STEPS and all(record.norm > 0.1 for record in wanted), "clipping must be active"
    worst = compare(ranks[0], wanted)
    assert_within(worst, bounds)
    for other in ranks[1:]:
        assert_bit_equal(ranks[0], other)
    return worst


def train(make_recipe, degree=2, observers=None, **settings):
    resolved = recipe(make_recipe, degree, **settings)
    return record_ranks(resolved, degree * settings.get("data", 1), observers, timeout_s=100)
