"""Recipes that proofs are tried on: small already, and as full of traps as the real ones."""

from __future__ import annotations

import yaml

from camshaft.recipe import load

ADAMW = {"adamw": {"lr": 3e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}}
TRAINING = {
    "lr_schedule": {"type": "linear", "warmup_steps": 20, "min_lr_ratio": 0.1},
    "clip": {"max_norm": 1.0},
    "precision": {"compute": "fp32"},
}
DDP = {"ddp": {"bucket_size_mb": 1.0}}
TP = {"tensor_parallel": {}}
SP = {"tensor_parallel": {"sequence_parallel": True}}


def zero(stage, **more):
    return {"zero": {"stage": stage, **more}}


def one(lr=1e-2, **more):
    return {"lr": lr, **more}


# name: (processes, parallel, plugins that differ, model that differs)
RECIPES = {
    "ddp": (2, {}, DDP, {}),
    "zero1": (2, {}, zero(1), {}),
    "zero2": (2, {}, zero(2), {}),
    "zero3": (2, {}, zero(3), {}),
    "hybrid": (4, {"data_parallel_shard": 2}, zero(3), {}),
    "tp": (2, {"tensor_parallel": 2}, TP, {"num_key_value_heads": 1}),
    "sp": (2, {"tensor_parallel": 2}, SP, {"tie_word_embeddings": False}),
    "1f1b": (2, {"pipeline_parallel": 2}, {"pipeline": {"schedule": "1f1b"}}, {}),
    "zbv": (2, {"pipeline_parallel": 2}, {"pipeline": {"schedule": "zbv"}}, {"attention_bias": True, "qk_norm": True}),
    "interleaved": (4, {"pipeline_parallel": 2}, {**DDP, "pipeline": {"schedule": "interleaved_1f1b"}}, {}),
    "recompute": (2, {}, {**DDP, "recompute": {"mode": "full"}}, {}),
    "kernels": (1, {}, {"kernels": {"linear_cross_entropy": "torch"}}, {}),
    "sgd": (1, {}, {"adamw": None, "sgd": one(momentum=0.9, nesterov=True, weight_decay=0.01)}, {}),
    "lion": (2, {}, {**zero(2), "adamw": None, "lion": one(1e-3)}, {}),
    "lamb": (2, {}, {**zero(1), "adamw": None, "lamb": one()}, {}),
    "adafactor": (2, {}, {**zero(1), "adamw": None, "adafactor": one(weight_decay=0.1)}, {}),
    "muon": (2, {}, {**zero(2), "adamw": None, "muon": one()}, {}),
    "deepspeed": (2, {}, {"deepspeed": {"stage": 2}}, {}),
}


def recipe(folder, name, **sections):
    """The recipe called ``name``, written into ``folder`` and loaded."""
    ranks, parallel, plugins, model = RECIPES[name]
    data = ranks // (parallel.get("tensor_parallel", 1) * parallel.get("pipeline_parallel", 1))
    tree = {
        "schema_version": 1,
        "name": name,
        "seed": 3,
        "model": {"preset": "llama-tiny", "num_hidden_layers": 5, "intermediate_size": 301, **model},
        "tokenizer": {"type": "byte"},
        "data": {"train": "python-docs", "sequence_length": 64, "pack": False, "cache_dir": str(folder / "cache")},
        "batch": {"micro_batch_size": 4, "global_batch_size": 4 * 8 * data},
        "training": {"max_steps": 100},
        "parallel": parallel,
        "launch": {"processes": ranks, "device": "cpu"},
        "plugins": {**ADAMW, **plugins, **TRAINING},
    }
    tree.update(sections)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return load(path)
