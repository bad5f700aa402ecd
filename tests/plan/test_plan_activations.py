"""What ``camshaft plan`` says that forwards keep, against what autograd keeps of real ones."""

import re
from collections import Counter

import pytest
import torch
from activation_counts import holdings, measured, saved_by
from torch.nn.attention import SDPBackend, sdpa_kernel

from camshaft.activations import Kept, by_kind
from camshaft.claims import Widths
from camshaft.cli import estimate, run
from camshaft.cli.ranks import Ranks
from camshaft.data.loader import Batch
from camshaft.errors import PluginError
from camshaft.host import Host
from camshaft.models.config import resolve
from camshaft.models.init import materialize
from camshaft.models.kept import Form, kept
from camshaft.models.llama import Llama
from camshaft.models.shapes import parameter_shapes
from camshaft.plugin import Plugin, hookimpl
from camshaft.recipe import check
from camshaft.recipe.schema import Model

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_that_stores_its_scores_is_counted_as_such(dtype):
    """CUDA's only kernel for grouped heads in fp32, and for fp64; a CPU takes it when it is told to."""
    model = Model(preset="llama-nano", vocab_size=50, num_attention_heads=6, num_key_value_heads=2, head_dim=8)
    config = resolve(model, 50)
    llama = Llama(config)
    materialize(llama, seed=0, device=torch.device("cpu"), dtype=dtype)
    tokens = torch.arange(24).view(2, 12)
    batch = Batch(tokens, tokens, torch.arange(12).expand(2, 12).contiguous(), None, 24)
    widths = Widths(*(5 * (dtype.itemsize,)))
    stages = dict.fromkeys((each.name for each in parameter_shapes(config)), 0)
    found, planned = {}, {}
    for device, backend in (("cpu", SDPBackend.FLASH_ATTENTION), ("cuda", SDPBackend.MATH)):
        with sdpa_kernel(backend):
            found[device] = saved_by(llama, batch)
        table = kept(config, widths, Form(2, 12, False, device), stages)
        planned[device] = sum(each.bytes for each in table if each.module.endswith("self_attn"))
    assert found["cuda"] - found["cpu"] == planned["cuda"] - planned["cpu"] > 0


class Halves(Plugin):
    """Keeps one half of everything."""

    @hookimpl
    def activations(self, kept):
        return [Kept(each.module, each.name, each.made, each.bytes // 2) for each in kept]


class Wrong(Plugin):
    @hookimpl
    def activations(self):
        return (7,)


def test_plugins_change_the_table_one_after_another(make_recipe):
    resolved = make_recipe(ADAMW)
    checked = check(resolved, 1, device="cpu").require()
    plain, twice = (Ranks(checked, Host(plugins)).fullest for plugins in ({}, {"a": Halves(), "b": Halves()}))
    assert sum(each.bytes for each in twice.kept) * 4 == pytest.approx(sum(each.bytes for each in plain.kept), rel=1e-3)
    assert twice.peak.bytes < plain.peak.bytes and twice.state == plain.state
    with pytest.raises(PluginError, match="'wrong', hook 'activations': must return Kept or None, got int"):
        estimate.activations(checked, Host({"wrong": Wrong()}), plain.sizes)


def test_the_first_stage_of_1f1b_holds_most_microbatches_and_is_the_fullest(recipe_of):
    resolved, world_size = recipe_of(PIPELINE, {"num_hidden_layers": 4, "vocab_size": 300, **UNTIED}, {}, PP)
    first, last = holdings(resolved, world_size)
    assert {each.microbatches for each in first.kept} == {2} and {each.microbatches for each in last.kept} == {1}


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_plan_prints_what_is_kept_by_what_makes_it(make_recipe, capsys, device):
    resolved = make_recipe(ADAMW, data={**make_recipe({}).tree["data"], "pack": True}, launch={"device": device})
    assert run(["plan", str(resolved.path)]) == 0
    text = capsys.readouterr().out
    (holding,) = holdings(resolved, 1)
    table = text.split("kept from forward to backward")[1].split("not counted")[0]
    numbers = [int(number.replace(",", "")) for number in re.findall(r"  ([\d,]+)  ", table)]
    if device == "cpu":
        assert numbers[: len(by_kind(holding.kept))] == list(by_kind(holding.kept).values())
        assert holding.peak.bytes in numbers
    else:  # a GPU's RMSNorm keeps less
        assert numbers[1] < by_kind(holding.kept)["norm"]


@pytest.mark.parametrize(("device", "width"), [("cuda", 2), ("cpu", 4), ("any", 2)])
def test_products_of_auto_are_counted_narrow_on_a_gpu_alone(make_recipe, device, width):
    for launch, wanted in (("auto", width), ("cpu", 4)):
        resolved = make_recipe({"precision": {}, **ADAMW}, launch={"device": launch})
        checked = check(resolved, 1, device=device).require()
        assert estimate.sizes(checked, Host({})).widths.compute == wanted
