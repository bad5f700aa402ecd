"""What is refused before anything starts, and how layers are divided; no torch is needed for either."""

import re
import subprocess
import sys
from itertools import combinations
from typing import get_args

import pipeline_runs as runs
import pytest

from camshaft.errors import RecipeError
from camshaft.models.stages import LLAMA, Span, stage_of
from camshaft.recipe import check
from camshaft_pipeline.options import Name, Split
from camshaft_pipeline.schedules import FAMILIES
from camshaft_pipeline.splitting import balanced, spans_of


def refused(make_recipe, options, world_size=2, **sections):
    resolved = runs.recipe(make_recipe, world_size, options, **sections)
    with pytest.raises(RecipeError) as failure:
        check(resolved, world_size).require()
    return str(failure.value)


WRONG = [
    ({"virtual_stages": 2}, "1f1b has 1 virtual stages a rank, got 2.*use interleaved_1f1b"),
    ({"schedule": "zbv", "virtual_stages": 3}, "zbv has 2 virtual stages a rank, got 3.*set virtual_stages to 2"),
    ({"schedule": "interleaved_1f1b", "virtual_stages": 1}, "at least 2 virtual stages a rank, got 1"),
    ({"schedule": "gpipe", "virtual_stages": 3}, "6 stages, and the model has 5 layers.*lower parallel.pipeline"),
    ({"split": {"layers": [1, 2]}}, "2 stages with 3 layers in all, but there are 2 stages and 5 layers"),
    ({"split": {"layers": [1, 1, 3]}}, "give 2 numbers whose sum is 5"),
    ({"split": {"starts": ["model.layers.1", "model.layers.3"]}}, r"layers \[1, 3\] cannot be the first ones"),
    ({"split": {"starts": ["model.layers.0", "model.norm"]}}, "'model.norm' does not end with the number of a layer"),
    ({"split": {"starts": ["model.layers.0", "layers.2"]}}, "'layers.2' is no layer of the model: they are called mod"),
    ({"split": {"times": [1, 2]}}, "2 times for a model with 5 layers.*give 5 times, or 7"),
    ({"split": {"times": [1] * 5, "layers": [2, 3]}}, "layers and times say different things of one split"),
    ({"table": "nowhere.csv"}, "'nowhere.csv' cannot be read"),
    ({"table": "nowhere.csv", "schedule": "zbv"}, "'schedule' has no effect beside 'table'"),
]


@pytest.mark.parametrize(("options", "said"), WRONG)
def test_what_cannot_be_is_refused_with_the_fix(make_recipe, options, said):
    text = refused(make_recipe, options)
    assert re.search(f"(?s){said}", text), text
    assert "plugins.pipeline" in text


def test_one_rank_is_no_pipeline(make_recipe):
    text = refused(make_recipe, {}, 1, parallel={"pipeline_parallel": 1})
    assert "gives that axis one rank" in text and "set parallel.pipeline_parallel=2 or more" in text


TABLES = [
    ("F0,B0\nF0@1,B0@1\n", "1 microbatches, and a step has 8"),
    ("F0,B0\n", "has 1 rows, and the pipeline has 2 ranks"),
    ("\n".join(",".join(f"{kind}{i}{at}" for kind in "FB" for i in range(7 + (at == ""))) for at in ("", "@1")), "@1"),
    ("F0,F0\nF0@1,B0@1\n", "F0"),
]


@pytest.mark.parametrize(("text", "said"), TABLES)
def test_a_faulty_table_is_refused_at_its_key(make_recipe, tmp_path, text, said):
    path = tmp_path / "mine.csv"
    path.write_text(text)
    told = refused(make_recipe, {"table": str(path)})
    assert said in told and "plugins.pipeline.table" in told


def test_two_owners_of_the_axis_are_named(make_recipe):
    """Without the plugin nobody claims the axis, and the recipe is refused for that."""
    resolved = runs.recipe(make_recipe, 2, None, parallel={"pipeline_parallel": 2}, plugins={"ddp": None})
    with pytest.raises(RecipeError, match="axis 'pp' has degree 2, and no enabled plugin claims it"):
        check(resolved, 2).require()


def test_plans_need_no_torch():
    code = (
        "import sys, camshaft_pipeline, camshaft_pipeline.planning, camshaft_pipeline.shapes, camshaft_pipeline.costs;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_options_name_every_schedule():
    assert get_args(Name) == tuple(FAMILIES)


def worst(costs, before, after, ends):
    stages = [sum(costs[a:b]) for a, b in zip((0, *ends[:-1]), ends, strict=True)]
    stages[0] += before
    stages[-1] += after
    return max(stages), sum(stage**2 for stage in stages)


@pytest.mark.parametrize("stages", [1, 2, 3, 5, 7])
@pytest.mark.parametrize(("before", "after"), [(0, 0), (9, 4), (2.5, 30)])
def test_the_balanced_split_is_the_best_of_all(stages, before, after):
    costs = (3, 1, 4, 1, 5, 9, 2)
    found = balanced(costs, before, after, stages)
    every = [(*cut, 7) for cut in combinations(range(1, 7), stages - 1)]
    assert found in every
    assert worst(costs, before, after, found) == min(worst(costs, before, after, ends) for ends in every)


def test_a_heavy_embedding_takes_layers_from_the_first_stage():
    spans = spans_of(Split(), [1.0] * 8, 3.0, 1.0, 4)
    assert [span.end - span.begin for span in spans] == [1, 2, 3, 2]
    assert max((span.end - span.begin) + 3 * span.first + span.last for span in spans) == 4
    assert spans[0].first and spans[-1].last and not spans[1].first


def test_a_deep_model_is_split_at_once():
    spans = spans_of(Split(), [1.0] * 128, 6.0, 6.0, 64)
    assert len(spans) == 64 and spans[0].begin == 0 and spans[-1].end == 128


def test_names_belong_to_stages():
    spans = (Span(0, 1, 3), Span(1, 3, 3))
    names = {"model.embed_tokens.weight": 0, "model.layers.0.mlp.x": 0, "model.layers.2.y": 1, "lm_head.weight": 1}
    assert {name: stage_of(name, spans, LLAMA) for name in names} == names
    assert stage_of("model.norm.weight", spans, LLAMA) == 1 and stage_of("model.rotary_emb", spans, LLAMA) == 0
