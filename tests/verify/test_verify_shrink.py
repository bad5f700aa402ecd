"""What a small recipe keeps of a large one."""

from pathlib import Path

import pytest
from verify_recipes import RECIPES, recipe

from camshaft.errors import RecipeError
from camshaft.recipe import check, load
from camshaft.verify.shrink import shrink
from camshaft.verify.sorting import another_optimizer, full_world, legal, sort

SHIPPED = Path(__file__).parents[2] / "recipes"
NAMES = sorted(path.name for path in SHIPPED.glob("*.yaml"))


def small(resolved, folder, steps=4):
    checked = check(resolved, full_world(resolved)).require()
    chosen = sort(resolved, checked)
    made = shrink(resolved, checked, chosen, folder, steps=steps)
    return made, chosen, checked


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_keeps_its_plugins_axes_and_shape(tmp_path, name):
    resolved = load(SHIPPED / name)
    made, chosen, checked = small(resolved, tmp_path)
    arranged, ranks = made.all(chosen)
    assert set(chosen.all) | set(chosen.left_out) == set(resolved.recipe.plugins)
    assert set(arranged.recipe.plugins) == set(chosen.all) and ranks <= 16
    several = {axis.name for axis in checked.mesh.axes if axis.degree > 1}
    assert several == {axis for axis, degree in made.degrees.items() if degree > 1}
    before, after = checked.config, made.tree["model"]
    ratio = before.num_attention_heads // before.num_key_value_heads
    assert after["num_attention_heads"] // after["num_key_value_heads"] == ratio
    for flag in ("tie_word_embeddings", "attention_bias", "qk_norm"):
        assert after[flag] == getattr(before, flag)
    assert arranged.recipe.debug.contracts and after["hidden_size"] <= 128
    assert (made.accumulation > 1) == (checked.batch.accumulation > 1)


def test_options_of_plugins_stay_but_for_sizes(tmp_path):
    made, _, _ = small(load(SHIPPED / "llama3_8b_64gpu.yaml"), tmp_path)
    assert made.sections["tensor_parallel"] == {"sequence_parallel": True}
    assert made.sections["pipeline"] == {"schedule": "interleaved_1f1b", "virtual_stages": 4}
    assert made.tree["model"]["num_hidden_layers"] >= 8, "a layer for each of 2 x 4 stages"
    zero = made.sections["zero"]
    assert zero["stage"] == 1 and zero["bucket_size_mb"] < 0.5, "several buckets"
    assert made.sections["lr_schedule"]["warmup_steps"] == 2
    assert made.sections["precision"] == {"compute": "fp64"}


UNEVEN = {
    "preset": "llama-tiny", "vocab_size": 50_257, "num_hidden_layers": 7, "intermediate_size": 301, "hidden_size": 96,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12, "qk_norm": True, "tie_word_embeddings": False,
}  # fmt: skip


def test_what_does_not_divide_stays_so(tmp_path):
    resolved = recipe(tmp_path, "tp", model=UNEVEN, parallel={"tensor_parallel": 2})
    made, _, _ = small(resolved, tmp_path)
    model = made.tree["model"]
    assert model["vocab_size"] % 2 == 1 and model["intermediate_size"] % 2 == 1
    assert model["hidden_size"] != model["num_attention_heads"] * model["head_dim"]
    assert (model["num_attention_heads"], model["num_key_value_heads"]) == (6, 2)
    resolved = recipe(tmp_path, "1f1b", model=UNEVEN)
    assert small(resolved, tmp_path)[0].tree["model"]["num_hidden_layers"] % 2 == 1


def test_each_window_counts_uneven_tokens_and_the_last_is_short(tmp_path):
    from camshaft.data import prepare
    from camshaft.data.loader import Loader
    from camshaft.state import BatchPlan

    made, chosen, _ = small(recipe(tmp_path, "ddp"), tmp_path)
    arranged, ranks = made.all(chosen)
    plan = BatchPlan(made.micro, made.samples, made.accumulation)
    data = prepare(arranged).train
    stop = arranged.recipe.training.max_tokens // arranged.recipe.data.sequence_length
    assert 3 * made.samples < stop < 4 * made.samples
    loaders = [Loader(data, plan, index=index, degree=ranks, seed=3, stop=stop) for index in range(ranks)]
    windows = [[loader.next() for _ in range(4)] for loader in loaders]
    for loader in loaders:
        loader.close()
    assert all(one.weight != other.weight for one, other in zip(*windows, strict=True))
    assert len({batch.weight for window in windows[0] for batch in window.batches}) > 3
    assert windows[0][-1].samples < made.samples


def test_an_option_that_cannot_be_small_is_left_out_and_told(tmp_path):
    resolved = recipe(tmp_path, "1f1b", parallel={"pipeline_parallel": 4}, launch={"processes": 4, "device": "cpu"})
    tree = dict(resolved.tree["plugins"])
    split = {"schedule": "1f1b", "split": {"layers": [1, 1, 1, 2]}}
    resolved = recipe(
        tmp_path, "1f1b", parallel={"pipeline_parallel": 4}, launch={"processes": 4, "device": "cpu"},
        plugins={**tree, "pipeline": split},
    )  # fmt: skip
    made, _, _ = small(resolved, tmp_path)
    kept = made.sections["pipeline"].get("split") == split["split"]
    assert kept == (made.degrees["pp"] == 4) and (kept or any("plugins.pipeline.split" in note for note in made.notes))


def test_data_need_not_be_there(tmp_path):
    data = {"train": {"files": ["nowhere.jsonl"]}, "sequence_length": 64}
    resolved = recipe(tmp_path, "zero1", data=data)
    assert check(resolved).problems
    chosen = sort(resolved, checked := legal(resolved, 2))
    assert shrink(resolved, checked, chosen, tmp_path, steps=4).samples == 12
    resolved = recipe(tmp_path, "zero1", data=data, batch={"micro_batch_size": 3, "global_batch_size": 4})
    with pytest.raises(RecipeError, match="global_batch_size"):
        legal(resolved, 2)


def test_what_no_plugin_has_is_told(tmp_path):
    made, _, _ = small(recipe(tmp_path, "deepspeed"), tmp_path)
    assert made.compute == "fp32" and any("fp64" in note and "DeepSpeed" in note for note in made.notes)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_plugins_are_sorted_by_claims_and_slots(tmp_path, name):
    resolved = recipe(tmp_path, name)
    _, chosen, checked = small(resolved, tmp_path)
    assert set(chosen.kept) == {checked.owners[slot][0] for slot in ("optimizer", "lr", "clip")}
    assert chosen.precision == "precision" and "precision" in chosen.compared and not chosen.left_out
    degrees = dict.fromkeys(chosen_axes(chosen), 2)
    assert set(chosen.left_alone(chosen.kept, degrees).values()) <= {1}
    assert chosen.left_alone(chosen.all, degrees) == degrees


def chosen_axes(chosen):
    return frozenset().union(*chosen.axes.values())


def test_another_optimizer_works_element_by_element():
    assert another_optimizer("adamw") == "sgd" and another_optimizer("sgd") not in ("sgd", "lamb", "muon")
