"""The fullest moment of a step, as ``camshaft plan`` counts it, against bytes of all tensors in a real step."""

import pytest
from activation_counts import holdings, measured

ADAMW = {"adamw": {"lr": 1e-3}, "clip": {"max_norm": 1.0}}
AUTOCAST = {"precision": {"compute": "bf16"}}
NARROW = {"precision": {"compute": "bf16", "parameters": "bf16"}}
TALL = {"hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 6, "head_dim": 8}
BROAD = {**TALL, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_key_value_heads": 6}
UNTIED = {"tie_word_embeddings": False}
LARGE = {"vocab_size": 3000, "num_hidden_layers": 2}
FUSED = {"kernels": {"linear_cross_entropy": "torch"}}
LONG = {"sequence_length": 64}
TP, PP = {"tensor_parallel": 2}, {"pipeline_parallel": 2}
ONE, FOUR = {"micro_batch_size": 8, "global_batch_size": 8}, {"micro_batch_size": 4, "global_batch_size": 16}


def budget(size):
    return {"recompute": {"mode": "selective", "budget_bytes": size}}


CASES = {
    "activations, one microbatch": ({}, TALL, LONG, {}, ONE),
    "activations, four microbatches": ({}, TALL, LONG, {}, FOUR),
    "state, one microbatch": ({}, BROAD, {"sequence_length": 8}, {}, {"micro_batch_size": 1, "global_batch_size": 1}),
    "state, four microbatches": ({}, BROAD, {"sequence_length": 8}, {}, {**ONE, "micro_batch_size": 2}),
    "autocast": (AUTOCAST, TALL, LONG, {}, FOUR),
    "bf16 parameters": (NARROW, {**TALL, **UNTIED}, LONG, {}, FOUR),
    "documents": ({}, TALL, {**LONG, "pack": True}, {}, ONE),
    "a large vocabulary": ({}, {**TALL, **LARGE}, LONG, {}, ONE),
    "fused loss": (FUSED, {**TALL, **LARGE}, LONG, {}, ONE),
    "fused loss, autocast": ({**AUTOCAST, **FUSED}, {**BROAD, **LARGE, **UNTIED}, LONG, {}, FOUR),
    "fused loss, bf16 parameters": ({**NARROW, **FUSED}, {**BROAD, **LARGE}, LONG, {}, FOUR),
    "recompute, full": ({"recompute": {"mode": "full"}}, TALL, LONG, {}, FOUR),
    "recompute, selective, autocast": ({"recompute": {"mode": "selective"}, **AUTOCAST}, BROAD, LONG, {}, FOUR),
    "recompute, a budget": (budget(1_000_000), TALL, LONG, {}, FOUR),
    "recompute, a budget that all fits in": (budget(10**9), TALL, LONG, {}, FOUR),
    "recompute, a budget that nothing fits in": (budget(0), TALL, LONG, {}, FOUR),
    "ddp": ({"ddp": {"bucket_size_mb": 0.05}}, TALL, LONG, {"data_parallel": 2}, FOUR),
    "zero 1": ({"zero": {"stage": 1, "bucket_size_mb": 0.1}}, BROAD, LONG, {"data_parallel": 2}, FOUR),
    "zero 2": ({"zero": {"stage": 2, "bucket_size_mb": 0.1}}, BROAD, LONG, {"data_parallel": 2}, FOUR),
    "zero 3": ({"zero": {"stage": 3}}, TALL, LONG, {"data_parallel": 2}, FOUR),
    "zero 1, bf16 parameters, mostly state": (
        {**NARROW, "zero": {"stage": 1, "bucket_size_mb": 0.1}},
        BROAD,
        {"sequence_length": 8},
        {"data_parallel": 2},
        {"micro_batch_size": 1, "global_batch_size": 4},
    ),
    "tp and sp": ({"tensor_parallel": {"sequence_parallel": True}}, {**TALL, **UNTIED}, LONG, TP, FOUR),
    "pp": ({"pipeline": {"schedule": "1f1b"}}, {**TALL, **UNTIED}, LONG, PP, FOUR),
}


@pytest.mark.parametrize("case", CASES)
def test_the_peak_of_a_step_is_as_planned(make_recipe, case):
    plugins, model, data, parallel, batch = CASES[case]
    tree, world_size = make_recipe({}).tree, 2 if parallel else 1
    sections = {
        "model": {**tree["model"], **model},
        "data": {**tree["data"], **data},
        "parallel": parallel,
        "batch": batch,
        "training": {"max_steps": 2, "log_every": 1},
    }
    resolved = make_recipe({"ddp": None, **plugins, **ADAMW}, world_size, **sections)
    found = measured(resolved, world_size, whole_step=True)
    planned = [(each.peak.bytes, each.peak.moment) for each in holdings(resolved, world_size)]
    for (expected, moment), most in zip(planned, found, strict=True):
        assert expected == pytest.approx(most, rel=0.06), moment
