"""What ``camshaft plan`` counts of layers that Inductor has compiled, against what their graphs keep, to the byte.

The graphs are those of torch's backend that decomposes and cuts as Inductor does, and compiles nothing: Inductor itself
would take a minute.
"""

import pytest
from activation_counts import holdings, measured

AUTOCAST = {"precision": {"compute": "bf16"}}
QWEN = {"qk_norm": True, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
CASES = {
    "fp32": ({}, {}, {}),
    "autocast": (AUTOCAST, {}, {"pack": True, "document_mask": True}),
    "autocast, qk_norm": (AUTOCAST, QWEN, {}),
    "attention alone": ({"compile": {"modules": ["model.layers.*.self_attn"]}}, {}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_plan_counts_what_compiled_layers_keep(make_recipe, case):
    plugins, model, data = CASES[case]
    tree = make_recipe({}).tree
    sections = {
        "model": {**tree["model"], "hidden_size": 24, "intermediate_size": 40, **model},
        "data": {**tree["data"], **data},
        "batch": {"micro_batch_size": 3, "global_batch_size": 6},
        "training": {"max_steps": 2, "log_every": 1},
    }

    def recipe(backend):
        chosen = {**plugins.get("compile", {}), "backend": backend}
        return make_recipe({"ddp": None, **plugins, "compile": chosen, "adamw": {"lr": 1e-3}}, 1, **sections)

    (holding,) = holdings(recipe("inductor"), 1)
    (forwards,) = measured(recipe("aot_eager_decomp_partition"), 1)
    compiled = sum(each.bytes for each in holding.kept)
    first = compiled + sum(each.once for each in holding.kept)
    assert [size for _, size in forwards] == [first, first, compiled, compiled]
    assert (compiled < first) == (case != "attention alone")
