"""What cannot be divided is refused, with what would do: most of it by ``validate``, without a process group."""

import pytest
from tensor_cases import recipe
from torch import nn

from camshaft.plugin import Plugin, hookimpl
from camshaft.recipe import check
from camshaft.testing.ranks import RankFailed
from camshaft.testing.run import record_ranks


def problems(make_recipe, degree=2, tensor=None, **model):
    return [str(each) for each in check(recipe(make_recipe, degree, tensor=tensor or {}, **model), degree).problems]


def only(found, *texts):
    assert len(found) == 1, found
    for text in texts:
        assert text in found[0]


def test_heads_that_do_not_divide(make_recipe):
    found = problems(make_recipe, 4, num_attention_heads=6, num_key_value_heads=6, head_dim=4)
    only(found, "parallel.tensor_parallel", "6 attention heads cannot be divided over 4 ranks", "1, 2, 3, 6")


def test_key_heads_that_neither_divide_nor_are_shared(make_recipe):
    found = problems(make_recipe, 4, num_attention_heads=12, num_key_value_heads=6, head_dim=4)
    only(found, "parallel.tensor_parallel", "6 key/value heads", "shared by them evenly", "num_key_value_heads")


def test_sequences_that_do_not_divide(make_recipe):
    settings = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4}
    assert problems(make_recipe, 3, **settings) == [], "whole on every rank they need not be divided"
    found = problems(make_recipe, 3, {"sequence_parallel": True}, **settings)
    only(found, "data.sequence_length", "32 tokens cannot be divided over 3 ranks", "such as 33", "sequence_parallel")


def test_an_axis_of_one_rank(make_recipe):
    only(problems(make_recipe, 1), "plugins.tensor_parallel", "gives that axis one rank", "parallel.tensor_parallel=2")


def test_the_axis_without_the_plugin(make_recipe):
    resolved = recipe(make_recipe, 1)
    resolved = make_recipe(
        dict(resolved.tree["plugins"]), 2, parallel={"tensor_parallel": 2}, model=resolved.tree["model"]
    )
    found = [str(each) for each in check(resolved, 2).problems]
    only(found, "axis 'tp' has degree 2", "tensor_parallel")


def test_async_without_anything_to_overlap(make_recipe):
    only(problems(make_recipe, 2, {"async": True}), "plugins.tensor_parallel.async", "sequence_parallel=true")


@pytest.mark.parametrize(
    ("style", "texts"),
    [
        ("colum", ("no style 'colum'", "region, column")),
        ("column:0", ("'column:0' has no meaning",)),
        ("loss:4", ("'loss:4' has no meaning",)),
        ("row:", ("'row:' has no meaning",)),
    ],
)
def test_styles_that_do_not_exist(make_recipe, style, texts):
    found = problems(make_recipe, 2, {"plan": {"model.*.up": style}})
    only(found, "plugins.tensor_parallel.plan.model.*.up", *texts)


class Builds(Plugin):
    def __init__(self, build):
        super().__init__()
        self.build = build

    @hookimpl
    def build_model(self, config):
        return self.build(config)


class Planless(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.table = nn.Embedding(config.vocab_size, config.hidden_size)


def refusal(make_recipe, tensor, build=None):
    """What every rank says of a model when it is built."""
    resolved = recipe(make_recipe, 2, tensor=tensor)
    with pytest.raises(RankFailed) as caught:
        record_ranks(resolved, 2, {"builds": Builds(build)} if build else None, timeout_s=60)
    text = str(caught.value)
    assert text.count("RecipeError") >= 2, text
    return text


def test_a_model_without_a_plan(make_recipe):
    text = refusal(make_recipe, {}, Planless)
    assert "Planless has no tensor_parallel_plan()" in text and "plugins.tensor_parallel.plan" in text


@pytest.mark.parametrize(
    ("tensor", "texts"),
    [
        ({"plan": {"model.layers.*.mpl": "region"}}, ("no module of the model matches 'model.layers.*.mpl'",)),
        ({"plan": {"loss": "outer"}}, ("has the style logits, and none has loss",)),
        ({"plan": {"lm_head": "outer"}}, ("has the style loss, and none has logits",)),
        ({"plan": {"model.norm": "region"}}, ("'model.norm' has parameters (weight) in a region", "inner if it sees")),
        ({"plan": {"*.down_proj": "row:5"}}, ("22 features, which are not whole units of 5",)),
        ({"plan": {"model.embed_tokens": "outer"}}, ("are one parameter, and the plan divides them differently",)),
        (
            {"plan": {"model.embed_tokens": "outer"}, "sequence_parallel": True},
            ("no module has the style embedding", "sequence_parallel=false"),
        ),
    ],
)
def test_plans_that_do_not_fit(make_recipe, tensor, texts):
    text = refusal(make_recipe, tensor)
    assert all(each in text for each in texts), text
