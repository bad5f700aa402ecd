"""Every schedule on 2 and 4 ranks against a plain loop in one process: gradients, norm, weights, state, loss."""

import pipeline_runs as runs
import pytest

from references import OPTIMIZERS

pytestmark = pytest.mark.broad


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_1f1b(make_recipe, tied):
    model = {"tie_word_embeddings": tied}
    wanted = runs.reference(runs.recipe(make_recipe, 1, model=model))
    runs.assert_equal(runs.recipe(make_recipe, 2, {}, model=model), 2, wanted)


SCHEDULES = ["gpipe", "1f1b", "interleaved_1f1b", "zb_h1", "zbv", "dualpipe_v"]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("world_size", [2, 4])
def test_every_schedule(make_recipe, schedule, world_size):
    """Nine layers over 2, 4 or 8 stages: never even. Odd schedules train with AdamW, the others with SGD."""
    model = {"num_hidden_layers": 9}
    name = ["adamw", "sgd"][SCHEDULES.index(schedule) % 2]
    optimizer, build = OPTIMIZERS[name]
    wanted = runs.reference(runs.recipe(make_recipe, 1, model=model, optimizer=optimizer), build)
    chosen = runs.recipe(make_recipe, world_size, {"schedule": schedule}, model=model, optimizer=optimizer)
    runs.assert_equal(chosen, world_size, wanted)


def test_a_short_last_window(make_recipe):
    """235 documents in windows of 40: the last one has 35, so its last microbatch has no token that counts."""
    sections = {
        "training": {"max_epochs": 1, "log_every": 1},
        "batch": {"micro_batch_size": 5, "global_batch_size": 40},
    }
    wanted = runs.reference(runs.recipe(make_recipe, 1, **sections))
    assert len(wanted) == 6
    runs.assert_equal(runs.recipe(make_recipe, 2, {"schedule": "zb_h1"}, **sections), 2, wanted)


@pytest.mark.parametrize("schedule", ["zb_h1", "zbv"])
def test_a_split_backward_with_products_that_overlap_their_gathers(make_recipe, schedule):
    """Layers with ``async`` have a forward of their own, so their weight products stay in I; the numbers stay too."""
    model = {"num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2}
    wanted = runs.reference(runs.recipe(make_recipe, 1, model=model))
    divided = {"tensor_parallel": {"sequence_parallel": True, "async": True}, "ddp": None}
    degrees = {"pipeline_parallel": 2, "tensor_parallel": 2}
    chosen = runs.recipe(
        make_recipe, 4, {"schedule": schedule}, ranks=2, model=model, plugins=divided, parallel=degrees
    )
    runs.assert_equal(chosen, 4, wanted)
