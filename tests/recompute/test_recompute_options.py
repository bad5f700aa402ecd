"""What means nothing together is refused with the fix, and a plugin that saves nothing says so."""

import pytest
import torch
from recompute_cases import FULL, Builds, recipe, train

from camshaft.errors import RecipeError
from camshaft.models.llama import Llama
from camshaft.plugin import Plugin, hookimpl
from camshaft.recipe import check
from camshaft.testing.ranks import RankFailed
from camshaft_recompute import operations
from camshaft_recompute.options import Options
from camshaft_recompute.patterns import KINDS, chosen, matches, number

REFUSED = {
    "save without choice": ({"mode": "full", "save": ["products"]}, "mode 'full' nothing is chosen", "mode=selective"),
    "budget without choice": ({"mode": "offload", "budget_gib": 1.0}, "'budget_gib' says what is kept", "budget_gib"),
    "budget with none": ({"mode": "none", "budget_bytes": 5}, "'budget_bytes' says what is kept", "budget_bytes"),
    "two budgets": ({"budget_gib": 1.0, "budget_bytes": 5}, "the budget is given twice", "remove budget_bytes"),
    "two choices": ({"budget_gib": 1.0, "save": ["products"]}, "so does the budget's choice", "remove save"),
    "a word": ({"save": ["matmuls"]}, "'matmuls' is no kind of operation; there are: products", "aten.mm"),
    "an operation": (
        {"save": ["aten.bmm", "aten.mmm", "my_lib.op"]},
        "torch has no operation 'aten.mmm'",
        "use aten.mm",
    ),
    "an overload": ({"save": ["aten.mm.default"]}, "torch has no operation 'aten.mm.default'", "use aten.mm"),
    "a pattern": ({"save": ["aten.scaleddot*"]}, "torch has no operation 'aten.scaleddot*'", "take a kind"),
    "no kinds": ({"save": []}, "'save' is empty", "name at least one"),
    "no modules": ({"modules": []}, "'modules' is empty", "name at least one"),
    "a size": ({"mode": "full", "offload_from_kib": 4.0}, "is about mode 'offload'", "mode=offload"),
    "a compiled budget": ({"budget_gib": 1.0}, "a compiled module has none of them", "plugins.compile=null"),
    "a compiled offload": ({"mode": "offload"}, "a compiled module has none of them", "plugins.compile=null"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused(make_recipe, case):
    options, said, fix = REFUSED[case]
    plugins = {"compile": {}} if "compiled" in case else {}
    found = check(recipe(make_recipe, 1, options, plugins=plugins), 1, device="cpu").problems
    (problem,) = [each for each in found if each.key.startswith("plugins.recompute")]
    assert said in problem.message and fix in problem.fix


@pytest.mark.parametrize(
    "options",
    [{"mode": "none", "every": 2}, {"every": 2, "layers": [0, 2]}, {"save": ["my_lib.*", "aten._scaled_dot*"]}],
)
def test_is_legal(make_recipe, options):
    assert check(recipe(make_recipe, 1, options), 1, device="cpu").problems == ()


def test_no_word_starts_a_run_that_says_what_the_model_has(make_recipe):
    with pytest.raises(RankFailed, match=r"no module is called 'model.layer.\*'; there are, for example, model, "):
        train(make_recipe, 1, {"mode": "full", "modules": ["model.layer.*"]}, kind=Llama)


def test_layers_that_the_model_lacks(make_recipe):
    with pytest.raises(RankFailed, match="the modules chosen have no layer 4; they are 0 to 3"):
        train(make_recipe, 1, {"mode": "full", "layers": [1, 4]}, kind=Llama)


def test_the_table_of_operations_is_that_of_the_torch_that_runs():
    """Names that torch has besides are of its script language, which no module calls."""
    there = {each.name.removeprefix("aten::") for each in torch._C._jit_get_all_schemas() if each.name[:6] == "aten::"}
    named = {each.removeprefix("aten.") for each in operations.native()}
    assert len(named) > 1000 and named <= there
    assert {"mm", "_to_copy", "native_layer_norm", "_fused_rms_norm", "silu", "_scaled_mm"} <= named
    assert not {name for kind in KINDS.values() for name in kind if name[:5] == "aten." and "*" not in name} - {
        *operations.native(),
        "aten._scaled_mm_v2",  # of newer torches
    }


def test_operations_that_torch_lacks_are_told_at_the_latest_when_it_is_there(make_recipe, monkeypatch):
    monkeypatch.setattr(operations, "native", frozenset)
    with pytest.raises(RankFailed, match=r"recompute.save: torch has no operation 'aten.mmm'. Fix: take a kind"):
        train(make_recipe, 1, {"save": ["aten.bmm", "my_lib.op", "aten.mmm"]})


def test_a_list_of_layers_is_never_called(make_recipe):
    with pytest.raises(RankFailed, match=r"no module is called 'model.layers'; there are, for example, model, "):
        train(make_recipe, 1, {"mode": "full", "modules": ["model.layers"]}, kind=Llama)


def test_a_divisor_that_no_layer_has(make_recipe):
    with pytest.raises(RankFailed, match="'every' is 3, and none of the modules chosen is in a layer whose number"):
        train(make_recipe, 1, {"mode": "full", "every": 3, "modules": ["model.norm"]}, kind=Llama)


LACKS = {
    "modules.1": {"modules": ["model.layers.*", "model.layer.*.mlp"]},
    "layers.0": {"layers": [4, 1]},
    "every": {"every": 2, "layers": [1, 3]},
}


@pytest.mark.parametrize("key", LACKS)
@pytest.mark.parametrize("stages", [1, 2])
def test_what_the_built_in_decoder_lacks_is_told_before_a_run(make_recipe, key, stages):
    plugins = {"ddp": None, "pipeline": {"schedule": "1f1b"}} if stages > 1 else {}
    options = {"mode": "full", **LACKS[key]}
    resolved = recipe(make_recipe, stages, options, plugins=plugins, parallel={"pipeline_parallel": stages})
    (problem,) = check(resolved, stages, device="cpu").problems
    assert problem.key == f"plugins.recompute.{key}" and problem.line and problem.fix
    assert check(resolved, stages, device="cpu", observers={"builds": Builds(Llama)}).problems == ()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mode": "full", "modules": ["model.layers.*.self_attn.q_proj"]}, "nothing is saved"),
        ({"mode": "offload", "offload_from_kib": 4096.0}, "lower plugins.recompute.offload_from_kib"),
    ],
    ids=["nothing to let go of", "all small"],
)
def test_a_run_in_which_nothing_is_saved_stops(make_recipe, options, said):
    with pytest.raises(RankFailed, match=f"(?s)plugins.recompute: did nothing by the end of step 1.*{said}"):
        train(make_recipe, 1, options, kind=Llama)


def test_a_stage_without_chosen_layers_is_no_reason_to_stop(make_recipe):
    settings = {
        "plugins": {"ddp": None, "pipeline": {"schedule": "1f1b"}},
        "parallel": {"pipeline_parallel": 2},
    }
    ranks = train(make_recipe, 2, {"mode": "full", "layers": [3]}, **settings)
    assert len(ranks[0]) == 2


def test_mode_none_changes_nothing_and_says_nothing(make_recipe):
    forwards = []

    class Looks(Plugin):
        @hookimpl
        def bind(self, state):
            forwards.append([name for name, module in state.model.named_modules() if "forward" in vars(module)])

    from camshaft.testing.run import record_ranks

    resolved = recipe(make_recipe, 1, {"mode": "none"})
    assert len(record_ranks(resolved, 1, {"builds": Builds(Llama), "looks": Looks()})[0]) == 2


def test_default_layers_are_those_of_the_modulelists_of_a_model_that_names_none(make_recipe):
    class Own(Llama):
        pipeline = None

    assert len(train(make_recipe, 1, FULL, kind=Own)[0]) == 2


def test_names():
    assert matches("model.layers.3.mlp", "model.layers.*.mlp") and not matches(
        "model.layers.3.mlp.up", "model.layers.*"
    )
    assert number("model.layers.12.mlp.3") == 12 and number("model.norm") is None
    names = [f"model.layers.{layer}{leaf}" for layer in range(6) for leaf in ("", ".mlp", ".mlp.up")]
    assert chosen(names, ["model.layers.*"], every=2) == [f"model.layers.{layer}" for layer in (0, 2, 4)]
    assert chosen(names, ["model.layers.*.mlp"], every=2, layers=[1, 2, 4]) == [
        "model.layers.2.mlp", "model.layers.4.mlp",
    ]  # fmt: skip
    both = chosen(names, ["model.layers.*.mlp.up", "model.layers.1", "model.layers.1.mlp"])
    assert "model.layers.1" in both and "model.layers.1.mlp" not in both and "model.layers.0.mlp.up" in both


def test_values_are_checked():
    for wrong in ({"every": 0}, {"layers": [-1]}, {"budget_gib": -1.0}, {"mode": "some"}):
        with pytest.raises(ValueError):
            Options(**wrong)
    assert Options(budget_gib=0.5).budget == 2**29 and Options().budget is None
    assert issubclass(RecipeError, Exception)
