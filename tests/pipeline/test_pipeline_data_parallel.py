"""Pipelines side by side: each stage's gradients are summed over its own data ranks, once a window."""

import pipeline_runs as runs
import pytest

DATA = {
    "ddp": {"ddp": {"bucket_size_mb": 0.002}},
    "zero1": {"ddp": None, "zero": {"stage": 1}},
    "zero2": {"ddp": None, "zero": {"stage": 2}},
    "zero3": {"ddp": None, "zero": {"stage": 3}},
}


@pytest.mark.parametrize(
    ("data", "schedule"),
    [
        ("ddp", "zb_h1"), ("ddp", "zbv"), ("zero1", "interleaved_1f1b"), ("zero2", "1f1b"), ("zero2", "zbv"),
        ("zero3", "zb_h1"), ("zero3", "zbv"),
    ],
)  # fmt: skip
def test_pipelines_side_by_side(make_recipe, data, schedule):
    model = {"num_hidden_layers": 5}
    wanted = runs.reference(runs.recipe(make_recipe, 1, model=model))
    chosen = runs.recipe(make_recipe, 4, {"schedule": schedule}, model=model, ranks=2, plugins=DATA[data])
    runs.assert_equal(chosen, 4, wanted)
