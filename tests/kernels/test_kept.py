"""What ``camshaft plan`` says that fused operations keep, against what autograd keeps of real forwards."""

import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "plan"))

from activation_counts import holdings, measured

FUSED = {"linear_cross_entropy": "torch"}
AUTOCAST = {"precision": {"compute": "bf16"}}
NARROW = {"precision": {"compute": "bf16", "parameters": "bf16"}}
UNTIED = {"tie_word_embeddings": False}
PACKED = {"pack": True, "document_mask": True}
CASES = {
    "fp32": (FUSED, {}, {}, {}, 1),
    "autocast, untied": (FUSED, AUTOCAST, UNTIED, {}, 1),
    "bf16 parameters": (FUSED, NARROW, UNTIED, {}, 1),
    "pipeline, tied": (FUSED, {"pipeline": {"schedule": "1f1b"}}, {}, {}, 2),
    "segments": ({"document_attention": "torch_segments"}, {}, {}, PACKED, 1),
    "segments and loss, autocast": ({"document_attention": "torch_segments", **FUSED}, AUTOCAST, UNTIED, PACKED, 1),
}


@pytest.fixture
def recipe_of(make_recipe):
    def build(kernels, plugins, model, data, world_size, **sections):
        tree = make_recipe({}).tree
        chosen = {
            "model": {**tree["model"], **model},
            "data": {**tree["data"], **data},
            "parallel": {"pipeline_parallel": world_size},
            "batch": {"micro_batch_size": 3, "global_batch_size": 12},
            "training": {"max_steps": 2, "log_every": 1},
        }
        plugins = {"ddp": None, **plugins, "adamw": {"lr": 1e-3}, "kernels": kernels}
        return make_recipe(plugins, world_size, **(chosen | sections))

    return build


@pytest.mark.parametrize("case", CASES)
def test_the_plan_counts_what_autograd_keeps(recipe_of, case):
    resolved, world_size = recipe_of(*CASES[case]), CASES[case][-1]
    for holding, forwards in zip(holdings(resolved, world_size), measured(resolved, world_size), strict=True):
        planned = Counter()
        for each in holding.kept:
            planned[each.stage] += each.bytes
        assert len(forwards) >= 4
        for stage, found in forwards:
            assert found == planned[stage], (case, holding.rank, stage)


def names(resolved):
    (holding,) = holdings(resolved, 1)
    return {(each.module, each.name): each for each in holding.kept}


def test_the_logits_are_gone_and_the_gradients_are_there(recipe_of):
    plain, fused = names(recipe_of({"rope": "auto"}, {}, {}, {}, 1)), names(recipe_of(*CASES["fp32"]))
    gone, new = plain.keys() - fused.keys(), fused.keys() - plain.keys()
    assert {("loss", "log_softmax"), ("model.norm", "output")} <= gone
    assert {name for _, name in new} == {"gradient of the hidden states", "gradient of the weight"}
    table = names(recipe_of({"linear_cross_entropy": "auto"}, {}, {}, {}, 1))
    assert table == fused, "auto counts what the rules take"


def test_triton_makes_the_activation_again(recipe_of, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    plain = names(recipe_of({"rope": "triton"}, {}, {}, {}, 1))
    fused = names(recipe_of({"swiglu": "triton", "cross_entropy": "triton"}, AUTOCAST, {}, {}, 1))
    unfused = names(recipe_of({"rope": "triton"}, AUTOCAST, {}, {}, 1))
    assert {each for each in unfused.keys() - fused.keys() if each[1] == "silu"} == {
        (f"model.layers.{layer}.mlp", "silu") for layer in range(3)
    }
    assert fused[("loss", "logits")].bytes * 2 == unfused[("loss", "log_softmax")].bytes
    assert ("loss", "log_softmax") in plain


@pytest.mark.parametrize(("precision", "factor"), [(NARROW, 2), (AUTOCAST, 1)], ids=["bf16 parameters", "autocast"])
def test_tritons_gradients_are_fp32(recipe_of, monkeypatch, precision, factor):
    """As ``test_triton_loss.py`` finds them kept."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    ours = names(recipe_of({"linear_cross_entropy": "triton"}, precision, UNTIED, {}, 1))
    plain = names(recipe_of(FUSED, precision, UNTIED, {}, 1))
    for name in ("gradient of the hidden states", "gradient of the weight"):
        assert ours[("lm_head", name)].bytes == factor * plain[("lm_head", name)].bytes > 0


@pytest.mark.parametrize("precision", [{}, AUTOCAST, NARROW], ids=["fp32", "autocast", "bf16 parameters"])
def test_tritons_chunk_is_there_while_the_loss_is_made(recipe_of, monkeypatch, precision):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    resolved = recipe_of({"linear_cross_entropy": "triton"}, precision, {**UNTIED, "vocab_size": 3000}, {}, 1)
    (holding,) = holdings(resolved, 1)
    widths, (making,) = holding.sizes.widths, [each for each in holding.kept if each.making]
    tokens = 3 * 32
    narrow = min(widths.param, widths.compute)
    casts = (tokens + 3000) * 20 * narrow if narrow < widths.param else 0
    assert making.making == tokens * 3008 * narrow + casts + tokens * 20 * widths.param
    assert making == holding.kept[-1], "everything else is there before"
    assert holding.peak.moment == "the forward of the output projection" and holding.peak.working == making.making


def test_on_a_gpu_auto_counts_what_the_rules_take_first(recipe_of):
    from camshaft.cli.ranks import Ranks
    from camshaft.host import Host
    from camshaft.recipe import check

    def table(kernels):
        resolved = recipe_of(kernels, {}, {"num_attention_heads": 4, "num_key_value_heads": 2}, PACKED, 1, launch={})
        checked = check(resolved, 1, device="any").require()
        kept = Ranks(checked, Host.of(resolved.recipe.plugins)).holding(0).kept
        return {(each.module.rpartition(".")[2], each.name): each.bytes for each in kept}

    plain, fused, flash = (
        table({"rope": "torch", "swiglu": "auto"}),
        table({"all": "auto"}),
        table({"document_attention": "flash_attention"}),
    )
    assert ("self_attn", "mask") in plain and ("self_attn", "mask") not in fused
    assert ("self_attn", "k for each query head") in fused and ("self_attn", "k") in flash
    assert flash[("self_attn", "k")] * 2 == plain[("self_attn", "k for each query head")]
    assert ("mlp", "silu") not in fused and ("loss", "log_softmax") not in fused
