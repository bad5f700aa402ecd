"""What ``camshaft plan`` counts of layers in fp8, against what autograd keeps of them, to the byte."""

import pytest
from activation_counts import holdings, measured

from camshaft_precision import Plugin

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
CASES = {
    "tensorwise": {},
    "rowwise, all but the output projection": {"recipe": "rowwise", "keep": ["lm_head"]},
    "gradients of weights in bf16": {"weight_gradient": "bf16"},
}


def recipe(make_recipe, options, **plugins):
    tree = make_recipe({}).tree
    sections = {
        "model": {**tree["model"], **SIZES, "num_hidden_layers": 4},
        "batch": {"micro_batch_size": 4, "global_batch_size": 8},
        "training": {"max_steps": 2, "log_every": 1},
    }
    precision = {"compute": "fp8", "fp8": options}
    return make_recipe({"ddp": None, "precision": precision, **plugins, "adamw": {"lr": 1e-3}}, 1, **sections)


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(Plugin, "_anywhere", True)


@pytest.mark.parametrize("case", CASES)
def test_the_plan_counts_what_layers_in_fp8_keep(make_recipe, case):
    resolved = recipe(make_recipe, CASES[case])
    (holding,), (forwards,) = holdings(resolved, 1), measured(resolved, 1)
    planned = sum(each.bytes + each.once for each in holding.kept)
    assert [size for _, size in forwards] == [planned] * 4


def compiled(make_recipe, options, layer):
    (holding,) = holdings(recipe(make_recipe, options, compile={}), 1)
    prefix = f"model.layers.{layer}."
    inner = [each for each in holding.kept if each.module.startswith(prefix) and each.bytes]
    return {(each.module.removeprefix(prefix), each.name): each.bytes for each in inner}


def test_compiled_layers_in_fp8_keep_eight_bits_of_what_products_take(make_recipe):
    """As Inductor's graphs keep them for a GPU: inputs and weights once, in 8 bits; the first layer is in bf16."""
    tokens, hidden, inner, queries = 4 * 32, 32, 48, 4 * 16
    first, second = (compiled(make_recipe, {}, layer) for layer in (0, 1))
    for place, elements in (
        (("input_layernorm", "output for q_proj"), tokens * hidden),
        (("post_attention_layernorm", "output for gate_proj"), tokens * hidden),
        (("mlp", "activated"), tokens * inner),
        (("self_attn.o_proj", "weight"), queries * hidden),
        (("mlp.down_proj", "weight"), inner * hidden),
    ):
        assert (first[place], second[place]) == (2 * elements, elements)
    assert second[("self_attn", "out in 8 bits")] * 2 == second[("self_attn", "out")] == 2 * tokens * queries
    assert first.keys() | {("self_attn", "out in 8 bits")} == second.keys()


def test_compiled_layers_with_scales_of_rows_read_again_what_their_inputs_are_made_of(make_recipe):
    eight, rows = compiled(make_recipe, {}, 1), compiled(make_recipe, {"recipe": "rowwise"}, 1)
    gone = {place for place in eight.keys() - rows.keys() if place[1] != "weight"}
    assert gone == {
        ("input_layernorm", "output for q_proj"),
        ("post_attention_layernorm", "output for gate_proj"),
        ("mlp", "activated"),
        ("self_attn", "out in 8 bits"),
    }
    assert not any(name == "weight" for _, name in rows) and rows.keys() < eight.keys()
    wide = compiled(make_recipe, {"weight_gradient": "bf16"}, 1)
    assert wide[("mlp", "activated")] == 2 * eight[("mlp", "activated")]
    assert wide[("mlp.down_proj", "weight")] == eight[("mlp.down_proj", "weight")]
