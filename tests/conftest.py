"""A corpus of uneven documents, and recipes over it."""

import gc
import json
import os
import random

import pytest
import yaml

from camshaft.recipe import load

pytest_plugins = ("broad", "forked", "spent")

# Before torch is: tests are as many processes as there are cores, and a second thread of each only waits, busily.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before anybody asks for a GPU: see camshaft.testing.ranks, which tests import later.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")


def pytest_collection_finish():
    """What was imported and collected stays: no collection of garbage has to look at it again."""
    gc.freeze()


def pytest_sessionfinish():
    """Libraries look at the end whether all is gone."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def same_environment():
    """Libraries write into the environment (DeepSpeed sets LOCAL_RANK), and what starts later would believe it."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """235 documents of 1 to 60 letters: with windows of 12 samples, 19 full ones and a last one of 7."""
    folder = tmp_path_factory.mktemp("corpus")
    chooser = random.Random(5)
    lines = [
        json.dumps({"text": f"{number} " + "".join(chooser.choices("abcdefgh .", k=chooser.randint(1, 60)))})
        for number in range(235)
    ]
    (folder / "documents.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def make_recipe(corpus, tmp_path):
    """Write a recipe and load it; ``plugins`` come before ``ddp``'s neighbours, keywords replace whole sections."""

    def make(plugins, world_size=1, accumulation=3, **sections):
        tree = {
            "schema_version": 1,
            "name": "parity",
            "seed": 3,
            "model": {
                "vocab_size": 259,
                "hidden_size": 20,
                "intermediate_size": 37,
                "num_hidden_layers": 3,
                "num_attention_heads": 5,
                "num_key_value_heads": 1,
                "head_dim": 6,
                "max_position_embeddings": 64,
                "rope_theta": 10000.0,
                "rms_norm_eps": 1e-6,
                "initializer_range": 0.05,
                "tie_word_embeddings": True,
            },
            "tokenizer": {"type": "byte"},
            "data": {
                "train": {"files": [str(corpus / "documents.jsonl")]},
                "validation_fraction": 0.0,
                "sequence_length": 32,
                "pack": False,
                "cache_dir": str(corpus / "cache"),
            },
            "batch": {"micro_batch_size": 12 // (accumulation * world_size), "global_batch_size": 12},
            "training": {"max_epochs": 1, "log_every": 1},
            "launch": {"device": "cpu", "threads_per_rank": 1, "group_timeout_s": 30},
            "run": {"dir": str(tmp_path / f"run{world_size}")},
            "plugins": {"ddp": {"bucket_size_mb": 0.005}, **plugins},
        }
        tree.update(sections)
        path = tmp_path / f"recipe{world_size}.yaml"
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
        return load(path, world_size=world_size)

    return make
