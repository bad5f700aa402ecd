"""What ``camshaft plan`` says that forwards keep, against what autograd keeps of real ones."""

from collections import Counter

import pytest
from activation_counts import holdings, measured

ADAMW = {"adamw": {"lr": 1e-3}}
AUTOCAST = {"precision": {"compute": "bf16"}}
NARROW = {"precision": {"compute": "bf16", "parameters": "bf16"}}
WIDE = {"precision": {"compute": "fp64"}}
DIVIDED = {"tensor_parallel": {"sequence_parallel": True}}
PIPELINE = {"pipeline": {"schedule": "1f1b"}}
UNTIED = {"tie_word_embeddings": False}
QWEN = {"qk_norm": True, "attention_bias": True, "num_key_value_heads": 5, **UNTIED}
EVEN = {"num_attention_heads": 6}
SHARED = {**EVEN, **QWEN, "num_key_value_heads": 2}
PACKED = {"pack": True, "document_mask": True}
TP, PP = {"tensor_parallel": 2}, {"pipeline_parallel": 2}

CASES = {
    "fp32, one key head, tied": ({}, {}, {}, {}),
    "fp64": (WIDE, {}, {}, {}),
    "autocast": (AUTOCAST, {}, {}, {}),
    "bf16 parameters": (NARROW, UNTIED, {}, {}),
    "documents": ({}, {}, PACKED, {}),
    "documents, autocast": (AUTOCAST, UNTIED, PACKED, {}),
    "qk_norm and biases": ({}, QWEN, {}, {}),
    "qk_norm and biases, autocast": (AUTOCAST, QWEN, {}, {}),
    "qk_norm and biases, bf16 parameters, documents": (NARROW, QWEN, PACKED, {}),
    "tp, one key head on both ranks": ({"tensor_parallel": {}}, EVEN, {}, TP),
    "tp, autocast, documents": ({"tensor_parallel": {}, **AUTOCAST}, {**EVEN, **UNTIED}, PACKED, TP),
    "tp and sp, qk_norm and biases": (DIVIDED, SHARED, {}, TP),
    "tp and sp, autocast, one token a row": ({**DIVIDED, **AUTOCAST}, EVEN, {"sequence_length": 2}, TP),
    "tp and sp, bf16 parameters, qk_norm": ({**DIVIDED, **NARROW}, SHARED, PACKED, TP),
    "pp": (PIPELINE, {}, {}, PP),
    "pp, autocast, untied, documents": ({**PIPELINE, **AUTOCAST}, UNTIED, PACKED, PP),
    "pp, two stages a rank": ({"pipeline": {"schedule": "zbv"}}, {"num_hidden_layers": 5}, {}, PP),
}


@pytest.fixture
def recipe_of(make_recipe):
    def build(plugins, model, data, parallel, **changes):
        tree = make_recipe({}).tree
        world_size = 2 if parallel else 1
        data_ranks = {} if parallel else {"ddp": {"bucket_size_mb": 0.005}}
        sections = {
            "model": {**tree["model"], **model},
            "data": {**tree["data"], **data},
            "parallel": parallel,
            "batch": {"micro_batch_size": 3, "global_batch_size": 12},
            "training": {"max_steps": 2, "log_every": 1},
            **changes,
        }
        return make_recipe({"ddp": None, **data_ranks, **plugins, **ADAMW}, world_size, **sections), world_size

    return build


@pytest.mark.parametrize("case", CASES)
def test_the_plan_counts_what_autograd_keeps(recipe_of, case):
    resolved, world_size = recipe_of(*CASES[case])
    for holding, forwards in zip(holdings(resolved, world_size), measured(resolved, world_size), strict=True):
        planned = Counter()
        for each in holding.kept:
            planned[each.stage] += each.bytes
        assert len(forwards) >= 4 and {stage for stage, _ in forwards} == set(planned)
        for stage, found in forwards:
            assert found == planned[stage], (case, holding.rank, stage)
