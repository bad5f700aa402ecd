"""Random numbers that a user's model draws with functions: those of one process, or refused before any step."""

import drawing_models as models
import pytest
import torch
import torch.nn.functional as F
from tensor_cases import check, recipe, train
from tensor_models import Builds
from torch.utils.checkpoint import checkpoint

from camshaft.plugin import Plugin, hookimpl
from camshaft.testing.compare import assert_bit_equal, compare
from camshaft.testing.ranks import RankFailed
from camshaft.testing.run import record_ranks
from camshaft_tensor_parallel.drawing import Drawing
from evaluated import EVALUATES, losses

SIZES = {"num_attention_heads": 4, "num_key_value_heads": 4}
SEQUENCE = {"sequence_parallel": True}


def builds(kind=models.Drawing):
    return {"builds": Builds(kind)}


@pytest.mark.parametrize("tensor", [{}, SEQUENCE, {**SEQUENCE, "async": True}], ids=["whole", "sequence", "async"])
def test_functions_draw_what_one_process_draws(make_recipe, tensor):
    """Three microbatches a step. Features, heads, attention weights, tokens; masks, noise and probabilities."""
    wanted = train(make_recipe, 1, builds(), **SIZES)[0]
    check(train(make_recipe, 2, builds(), tensor={**tensor, "plan": models.PLAN}, **SIZES), wanted)


def test_without_the_mode_they_do_not(make_recipe, monkeypatch):
    """The comparison above would not see draws that are off on both sides."""
    wanted = train(make_recipe, 1, builds(), **SIZES)[0]
    monkeypatch.setattr(Drawing, "around", lambda self, place, inner: inner)
    ranks = train(make_recipe, 2, builds(), tensor={"plan": models.PLAN}, **SIZES)
    assert compare(ranks[0], wanted)["loss"][0] > 1e-5


@pytest.mark.parametrize("tensor", [{}, SEQUENCE], ids=["whole", "sequence"])
def test_modules_that_drop_heads(make_recipe, tensor):
    """[b, heads, s, s], and [b, s, heads, 4] in another order of memory, in place."""
    wanted = train(make_recipe, 1, builds(models.DropsHeads), **SIZES)[0]
    check(train(make_recipe, 2, builds(models.DropsHeads), tensor={**tensor, "plan": models.MODULES}, **SIZES), wanted)


def test_heads_that_ranks_share_and_uneven_features(make_recipe):
    """Four ranks: two of them have the same key head, each has one query head, and 22 features are never even."""
    plan = {**models.MODULES, "blocks.*.attend.[kv]": "shared:4"}
    wanted = train(make_recipe, 1, builds(models.SharesHeads), **SIZES)[0]
    check(train(make_recipe, 4, builds(models.SharesHeads), tensor={"plan": plan}, **SIZES), wanted)
    wanted = train(make_recipe, 1, builds(), **SIZES)[0]
    check(train(make_recipe, 4, builds(), tensor={**SEQUENCE, "plan": models.PLAN}, **SIZES), wanted)


@pytest.mark.parametrize("tensor", [{}, SEQUENCE], ids=["whole", "sequence"])
def test_compiled_modules(make_recipe, tensor):
    """Modules that drop are compiled with the rest; functions are refused there before the first step."""
    compiled = {"compile": {"backend": "aot_eager", "modules": ["blocks.*"], "strict": True}}
    wanted = train(make_recipe, 1, builds(models.DropsHeads), **SIZES)[0]
    tensor = {**tensor, "plan": models.MODULES}
    check(train(make_recipe, 2, builds(models.DropsHeads), tensor=tensor, plugins=compiled, **SIZES), wanted)
    text = refusal(make_recipe, Builds(models.Drawing), {**tensor, "plan": models.PLAN}, compiled)
    assert "and 'blocks.0' is compiled" in text


@pytest.mark.parametrize("modules", [["blocks.*"], ["blocks.*.mix", "blocks.*.attend"]], ids=["blocks", "regions"])
def test_recompute(make_recipe, modules):
    """What runs again draws again, for the whole."""
    again = {"recompute": {"mode": "full", "modules": modules}}
    wanted = train(make_recipe, 1, builds(), **SIZES)[0]
    for tensor in ({}, SEQUENCE):
        tensor = {**tensor, "plan": models.PLAN}
        ranks = train(make_recipe, 2, builds(), tensor=tensor, plugins=again, **SIZES)
        check(ranks, wanted)
        assert_bit_equal(ranks[0], train(make_recipe, 2, builds(), tensor=tensor, **SIZES)[0])


def test_beside_data_parallel(make_recipe):
    """Two rows a microbatch; the two parts of the batch draw numbers of their own, as two processes do."""
    wanted = record_ranks(recipe_of_two(make_recipe), 2, builds(), timeout_s=100)[0]
    ranks = train(make_recipe, 2, builds(), data=2, tensor={**SEQUENCE, "plan": models.PLAN}, **SIZES)
    check(ranks, wanted)


def recipe_of_two(make_recipe):
    tree = recipe(make_recipe, 2, data=2, tensor={}, **SIZES).tree
    plugins = {name: options for name, options in tree["plugins"].items() if name != "tensor_parallel"}
    sections = {key: tree[key] for key in ("model", "batch", "training")}
    return make_recipe(plugins, 2, **sections)


def test_evaluation_draws_nothing(make_recipe, tmp_path):
    """Before the first step, where everything is watched, and behind it."""
    found = []
    for world_size, tensor in ((1, None), (2, {**SEQUENCE, "plan": models.PLAN})):
        tree = recipe(make_recipe, world_size, tensor=tensor, **SIZES).tree
        sections = {key: tree[key] for key in ("model", "batch", "parallel") if key in tree}
        data = tree["data"] | {"validation_fraction": 0.2}
        resolved = make_recipe(dict(tree["plugins"]), world_size, data=data, training=EVALUATES, **sections)
        found.append(losses(resolved, world_size, tmp_path / str(world_size), builds()))
    assert len(found[0]) == 3
    assert found[1] == pytest.approx(found[0], rel=1e-12)


class NoStep(Plugin):
    """Does not let an optimizer step be done."""

    @hookimpl
    def post_reduce(self):
        raise AssertionError("steps were done")


def refusal(make_recipe, builds, tensor, plugins=None):
    """What both ranks say before the first step."""
    resolved = recipe(make_recipe, 2, tensor=tensor, plugins=plugins, **SIZES)
    with pytest.raises(RankFailed) as caught:
        record_ranks(resolved, 2, {"builds": builds, "steps": NoStep()}, timeout_s=60)
    text = str(caught.value)
    told = [line for line in text.splitlines() if "RecipeError: " in line and ": plugins.tensor_parallel: " in line]
    assert len(told) == 2 and "steps were done" not in text, text
    assert "Fix: draw them with a torch.nn.Dropout" in text
    return text


def attention(features):
    heads = features.unflatten(-1, (1, -1)).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.1).transpose(1, 2).flatten(2)


CASES = {
    "folded": (lambda x: F.dropout(x.flatten(0, 1), 0.1).view_as(x), "inside", {}, "functional.dropout", "not clearly"),
    "heads": (
        lambda x: F.dropout(x.unflatten(-1, (1, -1)), 0.1).flatten(2), "inside", {}, "dropout", "how many heads",
    ),
    "kernel": (attention, "inside", {}, "scaled_dot_product_attention", "dropout_p=0.1"),
    "logits": (lambda x: F.dropout(x, 0.1), "logits", {}, "the model itself", "outside of every region"),
    "rows": (lambda x: x * (torch.rand(x.shape[0], 1, 1) < 2), "between", SEQUENCE, "'blocks.0'", "[1, 1, 1]: "),
    "flat": (
        lambda x: F.dropout(x[0], 0.1).unsqueeze(0), "between", SEQUENCE, "'blocks.0'", "sequence_parallel=false",
    ),
    "factory": (lambda x: x + torch.randn(x.shape), "between", SEQUENCE, "torch.randn", "nobody knows how to draw"),
    "rrelu": (lambda x: F.rrelu(x, training=True), "inside", {}, "'blocks.0.mix'", "rrelu"),
    "empty": (lambda x: x + torch.empty_like(x).normal_(), "inside", {}, "Tensor.normal_", "whether it is divided"),
    "zeros": (lambda x: F.dropout(0 * x, 0.1), "inside", {}, "functional.dropout", "one and the same number"),
    "strided": (
        lambda x: F.dropout(x.mT.contiguous().mT, 0.1), "between", SEQUENCE, "functional.dropout", "its memory",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("draw", "where", "tensor", "operation", "why"), CASES.values(), ids=CASES)
def test_what_nobody_can_draw_is_refused_in_the_first_window(make_recipe, draw, where, tensor, operation, why):
    text = refusal(make_recipe, models.one(draw, where), {**tensor, "plan": models.MIX})
    assert "would not be those of one process. Fix: " in text
    assert operation in text and why in text, text


def again(features):
    return checkpoint(lambda x: F.dropout(torch.tanh(x), 0.2), features, use_reentrant=False)


@pytest.mark.parametrize(("where", "tensor"), [("inside", {}), ("between", SEQUENCE)])
def test_a_function_that_a_checkpoint_of_ones_own_runs_again_is_refused(make_recipe, where, tensor):
    """It runs again in backward, where nobody knows of the module that called it: torch sees other saved tensors."""
    observers = {"builds": models.one(again, where), "steps": NoStep()}
    train(make_recipe, 1, {"builds": models.one(again, where)}, **SIZES)
    with pytest.raises(RankFailed) as caught:
        train(make_recipe, 2, observers, tensor={**tensor, "plan": models.MIX}, **SIZES)
    assert str(caught.value).count("CheckpointError: ") == 2 and "steps were done" not in str(caught.value)


RIGHT = {
    "scalars": (lambda x: x * (1 + torch.rand(())), "inside", {}),
    "scalars-between": (lambda x: x * torch.empty(()).uniform_(), "between", SEQUENCE),
    "tokens": (lambda x: x + F.feature_alpha_dropout(x, 0.3, True), "between", SEQUENCE),
    "noise": (lambda x: x + 0.1 * torch.randn_like(x), "inside", SEQUENCE),
}


@pytest.mark.parametrize(("draw", "where", "tensor"), RIGHT.values(), ids=RIGHT)
def test_what_is_clear_is_drawn(make_recipe, draw, where, tensor):
    observers = {"builds": models.one(draw, where)}
    wanted = train(make_recipe, 1, observers, **SIZES)[0]
    check(train(make_recipe, 2, observers, tensor={**tensor, "plan": models.MIX}, **SIZES), wanted)


def test_a_rate_that_rises_later_is_watched_from_the_first_window_on(make_recipe):
    """What a function is called with in its first window need not draw; the module stays in the mode."""

    def rising():
        calls = []

        def draw(features):
            calls.append(1)
            rate = 0.4 if len(calls) > 8 else 0.0
            return F.dropout(features, rate, features.requires_grad)

        return {"builds": models.one(draw, "inside")}

    wanted = train(make_recipe, 1, rising(), **SIZES)[0]
    ranks = train(make_recipe, 2, rising(), tensor={**SEQUENCE, "plan": models.MIX}, **SIZES)
    check(ranks, wanted)
    flat = train(make_recipe, 1, {"builds": models.one(lambda features: features, "inside")}, **SIZES)[0]
    assert compare(wanted, flat)["loss"][0] > 1e-6


def test_models_that_draw_nothing_get_no_forward(make_recipe):
    """The built-in decoder is as it was, in the first window too."""
    from camshaft.models.config import resolve
    from camshaft.models.llama import Llama
    from camshaft_tensor_parallel.drawing import may_draw

    resolved = recipe(make_recipe, 1)
    with torch.device("meta"):
        model = Llama(resolve(resolved.recipe.model, 64))
    assert not any(may_draw(module) for module in model.modules())
