from __future__ import annotations

import json

import pytest
from data_files import sentence

from camshaft.recipe import load


@pytest.fixture
def write(tmp_path):
    """Writes a recipe with this data section and loads it."""

    def make(source, *, tokenizer=None, model=None, seed=0, **sections):
        recipe = {
            "schema_version": 1,
            "name": "t",
            "seed": seed,
            "model": {"preset": "llama-tiny", **(model or {})},
            "data": {"train": source, "sequence_length": 32, "cache_dir": "cache", **sections.pop("data", {})},
            "batch": {"micro_batch_size": 1, "global_batch_size": 1},
            "training": {"max_steps": 1, **sections.pop("training", {})},
            "plugins": {"adamw": {"lr": 0.001}},
            **({} if tokenizer is None else {"tokenizer": tokenizer}),
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps(recipe, indent=1))  # JSON is YAML
        return load(path)

    return make


@pytest.fixture
def text(tmp_path):
    records = [json.dumps({"text": sentence(seed, 5 + seed % 40)}) for seed in range(120)]
    (tmp_path / "text.jsonl").write_text("\n".join(records))
    return {"files": ["text.jsonl"]}
