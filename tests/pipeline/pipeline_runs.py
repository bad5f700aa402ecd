"""Recipes with a pipeline, their reference in one process, and the comparison of both."""

import torch

from camshaft.data import prepare
from camshaft.plugin import Plugin, hookimpl
from camshaft.testing.compare import assert_bit_equal, assert_within, compare
from camshaft.testing.reference import plain_run
from camshaft.testing.run import record_ranks

EXACT = {"gradients": 1e-12, "norm": 1e-12, "weights": 1e-12, "optimizer": 1e-12, "loss": 1e-12, "lr": 1e-15}
ADAMW = {"adamw": {"lr": 3e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}}
SGD = {"sgd": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}}
MAX_NORM = 0.1
MODEL = {
    "vocab_size": 259,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
}


def groups(model, decay):
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    return [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]


def torch_adamw(model):
    return torch.optim.AdamW(groups(model, 0.1), lr=3e-3, betas=(0.9, 0.95), eps=1e-8)


def torch_sgd(model):
    return torch.optim.SGD(groups(model, 0.01), lr=0.05, momentum=0.9)


OPTIMIZERS = {"adamw": (ADAMW, torch_adamw), "sgd": (SGD, torch_sgd)}


def recipe(make_recipe, world_size, pipeline=None, *, model=None, optimizer=ADAMW, ranks=None, **sections):
    """``pipeline``: the plugin's options (None: one process); ``ranks``: pipeline ranks, all of them if None."""
    plugins = {**optimizer, "clip": {"max_norm": MAX_NORM}, "precision": {"compute": "fp64"}}
    ranks = ranks or world_size
    if pipeline is not None:
        plugins["pipeline"] = pipeline
        sections.setdefault("parallel", {"pipeline_parallel": ranks})
    data = world_size // ranks if pipeline is not None else world_size
    if data == 1:
        plugins["ddp"] = None
    chosen = {"training": {"max_steps": 3, "log_every": 1}, "batch": {"micro_batch_size": 1, "global_batch_size": 8}}
    extra = sections.pop("plugins", {})
    return make_recipe({**plugins, **extra}, world_size, model=MODEL | (model or {}), **(chosen | sections))


def reference(resolved, build=torch_adamw, prepare_model=lambda model: None, compute="fp64"):
    records = plain_run(resolved, prepare(resolved), build, compute=compute, max_norm=MAX_NORM, prepare=prepare_model)
    assert all(record.norm > MAX_NORM for record in records), "clipping must be active in every step"
    return records


def assert_equal(resolved, world_size, wanted, observers=None, bounds=EXACT):
    """Train on ranks: rank 0 has the reference's numbers, and all ranks have one another's in every bit."""
    ranks = record_ranks(resolved, world_size, observers)
    assert_within(compare(ranks[0], wanted), bounds)
    for other in ranks[1:]:
        assert_bit_equal(ranks[0], other)
    return ranks


__all__ = ["Plugin", "assert_bit_equal", "assert_within", "compare", "hookimpl", "record_ranks"]
