"""Recipes, bounds and references that the tests of the data-parallel family under other axes share."""

from __future__ import annotations

import torch

from camshaft.data import prepare
from camshaft.models.llama import Llama
from camshaft.plugin import Plugin, hookimpl
from camshaft.testing.compare import assert_bit_equal
from camshaft.testing.reference import plain_run
from camshaft.testing.run import record_ranks

# The gate of issue 4; the noise of sums in another order is 1e-15.
EXACT = {"gradients": 1e-12, "norm": 1e-12, "weights": 1e-12, "optimizer": 1e-12, "loss": 1e-12, "lr": 1e-15}
MAX_NORM = 0.1
BOTH = {"dp_shard": "shard", "dp_replicate": "shard"}
BUCKET = 0.01
"""MiB: several buckets even for a small model."""
ROWS = {
    "none": None,
    "ddp": None,
    "zero 1": {"stage": 1, "bucket_size_mb": BUCKET},
    "zero 2": {"stage": 2, "bucket_size_mb": BUCKET},
    "zero 2 last": {"stage": 2, "bucket_size_mb": BUCKET, "reduce": "last"},
    "zero 3": {"stage": 3},
    "zero 3 last": {"stage": 3, "reduce": "last"},
    "zero 3 kept": {"stage": 3, "reshard_after_forward": False},
    "hybrid 2": {"stage": 2, "bucket_size_mb": BUCKET},
    "hybrid 3": {"stage": 3},
    "hybrid 1, optimizer along both": {"optimizer": BOTH, "bucket_size_mb": BUCKET},
    "hybrid 3, optimizer along both": {"parameters": "shard", "gradients": "shard", "optimizer": BOTH},
}
ADAMW = {"adamw": {"lr": 3e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}}


def torch_adamw(model):
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), eps=1e-8)


def plugins(row, optimizer=None, compute="fp64", max_norm=MAX_NORM, **more):
    """The plugins of a recipe."""
    return {
        "ddp": {"bucket_size_mb": 0.005} if row == "ddp" else None,
        **({} if ROWS[row] is None else {"zero": ROWS[row]}),
        **(optimizer or ADAMW),
        "clip": {"max_norm": max_norm},
        "precision": compute if isinstance(compute, dict) else {"compute": compute},
        **more,
    }


def training(steps, samples=12):
    """A section for ``steps`` windows, the last of which is short."""
    return {"max_tokens": 32 * ((steps - 1) * samples + 7), "log_every": 1}


_references = {}


def reference(make_recipe, steps, key="", prepare_model=lambda model: None, build=torch_adamw, **sections):
    """Records of the plain loop, made once for each ``key``."""
    if (key, steps) not in _references:
        whole = {"micro_batch_size": 12, "global_batch_size": 12}
        resolved = make_recipe({**ADAMW, "ddp": None}, batch=whole, training=training(steps), **sections)
        records = plain_run(
            resolved, prepare(resolved), build, compute="fp64", max_norm=MAX_NORM, prepare=prepare_model
        )
        assert len(records) == steps and all(record.norm > MAX_NORM for record in records), "clipping is active"
        _references[key, steps] = records
    return _references[key, steps]


STEPS = 4
MODEL = {
    "vocab_size": 259,
    "hidden_size": 16,
    "intermediate_size": 22,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
}


class Frozen(Plugin):
    """Owns ``build_model``: parameters whose name has one of ``words`` in it do not train."""

    def __init__(self, *words):
        super().__init__()
        self.words = words

    def freeze(self, model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not any(word in name for word in self.words))

    @hookimpl
    def build_model(self, config):
        model = Llama(config)
        self.freeze(model)
        return model


AXES = {
    "cut": {},  # along pp, with a pipeline that the test gives
    "tp": {"tensor_parallel": {}},
    "tp + sp": {"tensor_parallel": {"sequence_parallel": True}},
    **{name: {"pipeline": {"schedule": name}} for name in ("1f1b", "interleaved_1f1b", "zb_h1", "zbv")},
}


def parallel(axis, row, data):
    """The recipe's section."""
    section = {"tensor_parallel": 2} if axis.startswith("tp") else {"pipeline_parallel": 2}
    if row.startswith("hybrid"):
        section["data_parallel_shard"] = data // 2
    return section


def run(make_recipe, row, axis, data=2, accumulation=3, observers=None, more=None, **settings):
    """Records of a run on ``data`` data ranks times two along ``axis``, equal on all ranks in every bit."""
    resolved = make_recipe(
        plugins(row, **settings, **AXES[axis], **(more or {})),
        2 * data,
        model=MODEL,
        batch={"micro_batch_size": 12 // (accumulation * data), "global_batch_size": 12},
        training=training(STEPS),
        parallel=parallel(axis, row, data),
    )
    records = record_ranks(resolved, 2 * data, observers, timeout_s=100)
    for other in records[1:]:
        assert_bit_equal(records[0], other)
    return records[0]
