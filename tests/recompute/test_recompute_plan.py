"""The plan's table under recomputation is what a rank holds, to the byte; what means nothing together is refused."""

import pytest
from recompute_cases import FULL, SELECTIVE, recipe
from test_recompute_bytes import GIB, measured

from camshaft.cli.ranks import Ranks
from camshaft.host import Host
from camshaft.recipe import check
from camshaft.testing.ranks import run_ranks

ATTENTION = {"mode": "selective", "save": ["products", "attention"]}
HALVES = {"mode": "full", "modules": ["model.layers.*.self_attn", "model.layers.*.mlp"]}
CASES = {"full": FULL, "selective": SELECTIVE, "attention": ATTENTION, "halves": HALVES,
         "every third": {"mode": "full", "every": 3}}  # fmt: skip
DEEP = {"num_hidden_layers": 5, "num_key_value_heads": 1}


def table(resolved, ranks, rank):
    checked = check(resolved, ranks, device="cpu").require()
    return Ranks(checked, Host.of(resolved.recipe.plugins)).holding(rank).kept


def saved(make_recipe, ranks, options, **settings):
    """Bytes less of a microbatch on each rank, by the plan."""
    with_and_without = [recipe(make_recipe, ranks, each, **settings) for each in (None, options)]
    return [
        sum(each.bytes for each in table(with_and_without[0], ranks, rank))
        - sum(each.bytes for each in table(with_and_without[1], ranks, rank))
        for rank in range(ranks)
    ]


def test_what_is_gone_comes_back_in_backward(make_recipe):
    """The fullest moment of a step has a layer's rows again, by what made them."""
    plain, full = (table(recipe(make_recipe, 1, each), 1, 0) for each in (None, FULL))
    layers = [each for each in plain if each.module.startswith("model.layers.") and each.made != "input"]
    again = {(each.module, each.name): each.again for each in full if each.again}
    assert again == {(each.module, each.name): each.bytes for each in layers} and len(again) > 4
    assert not any(each.again for each in plain)


def test_the_plan_says_what_it_does_not_count(make_recipe):
    for parallel, said in (("tp", True), ("sp", True), ("pp", False)):
        resolved = recipe(make_recipe, 2, FULL, **PARALLEL[parallel])
        checked = check(resolved, 2, device="cpu").require()
        found = Ranks(checked, Host.of(resolved.recipe.plugins)).holding(0).estimate.notes
        assert any("exchange again" in note for note in found) == said


def run(make_recipe, ranks, options, **settings):
    resolved = recipe(make_recipe, ranks, options, **settings)
    found = run_ranks(ranks, measured, resolved, {}, timeout_s=100)
    return [extras["plugin/recompute/saved_gib"] * GIB for _, extras, _ in found]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
def test_what_the_plan_says_is_saved(make_recipe, case, compute, packed):
    settings = {"compute": compute, "model": DEEP}
    if packed:
        resolved = make_recipe({})
        settings["data"] = resolved.tree["data"] | {"pack": True, "document_mask": True}
    planned = saved(make_recipe, 1, CASES[case], **settings)
    assert planned == run(make_recipe, 1, CASES[case], **settings)


PARALLEL = {
    "tp": {"plugins": {"ddp": None, "tensor_parallel": {}}, "parallel": {"tensor_parallel": 2}},
    "sp": {
        "plugins": {"ddp": None, "tensor_parallel": {"sequence_parallel": True}},
        "parallel": {"tensor_parallel": 2},
    },
    "pp": {"plugins": {"ddp": None, "pipeline": {"schedule": "1f1b"}}, "parallel": {"pipeline_parallel": 2}},
}


@pytest.mark.parametrize("case", ["full", "selective"])
@pytest.mark.parametrize("parallel", PARALLEL)
def test_what_the_plan_says_is_saved_on_each_rank(make_recipe, case, parallel):
    settings = {"model": DEEP, **PARALLEL[parallel]}
    planned = saved(make_recipe, 2, CASES[case], **settings)
    assert planned == run(make_recipe, 2, CASES[case], **settings) and min(planned) > 0


@pytest.mark.parametrize(
    "modules", [None, ["model.layers.*.self_attn", "model.layers.*.mlp"]], ids=["layers", "halves"]
)
def test_offloaded_tensors_come_back_for_two_layers_at_a_time(make_recipe, modules):
    options = {"mode": "offload"} | ({} if modules is None else {"modules": modules})
    kept = table(recipe(make_recipe, 1, options, model=DEEP), 1, 0)
    layers = [[each for each in kept if each.module.startswith(f"model.layers.{layer}.")] for layer in range(5)]
    own = [sum(each.again for each in rows if each.name != "fetched ahead") for rows in layers]
    ahead = [sum(each.again for each in rows if each.name == "fetched ahead") for rows in layers]
    assert ahead[0] == 0
    if modules is None:
        assert ahead[1:] == own[:-1] and min(own) > 0
    else:
        mlp = [sum(each.again for each in rows if ".mlp" in each.module) for rows in layers]
        assert ahead[1:] == mlp[:-1] and min(mlp) > 0
