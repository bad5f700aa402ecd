"""Random numbers of a model in stages: those of one process, whatever the schedule, and when layers run again."""

import dropping_models as models
import pipeline_runs as runs
import pytest

from camshaft.testing.ranks import RankFailed
from evaluated import EVALUATES, losses

SCHEDULES = ["gpipe", "1f1b", "interleaved_1f1b", "zb_h1", "zbv", "dualpipe_v"]


def alone(make_recipe, observers=None, **sections):
    """One process of the engine, which draws: the plain reference draws nothing."""
    observers = observers or {"builds": models.Builds()}
    return runs.record_ranks(runs.recipe(make_recipe, 1, **sections), 1, observers)[0]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule(make_recipe, schedule):
    """Eight microbatches a step, tied tables."""
    wanted = alone(make_recipe)
    chosen = runs.recipe(make_recipe, 2, {"schedule": schedule})
    runs.assert_equal(chosen, 2, wanted, {"builds": models.Builds()})


def test_the_numbers_are_drawn(make_recipe, monkeypatch):
    """The comparison above would not see draws that are off on both sides, nor seeds that do nothing."""
    from camshaft import seeds

    wanted = alone(make_recipe)
    monkeypatch.setattr(seeds.Seeds, "_enter", lambda self, number, layer, arguments: None)
    other = alone(make_recipe)
    assert runs.compare(other, wanted)["loss"][0] > 1e-4
    staged = runs.record_ranks(runs.recipe(make_recipe, 2, {}), 2, {"builds": models.Builds()})[0]
    assert runs.compare(staged, other)["loss"][0] > 1e-4, "without seeds of layers the stages draw their own"


@pytest.mark.parametrize("modules", [["model.layers.*"], ["model.layers.*.block"], ["model"]])
def test_recompute(make_recipe, modules):
    """Of layers, of what is inside of one, and of all layers together, which are then seeded again in backward."""
    wanted = alone(make_recipe)
    recompute = {"recompute": {"mode": "full", "modules": modules}}
    runs.assert_bit_equal(alone(make_recipe, plugins=recompute), wanted)
    for schedule in ("1f1b", "zb_h1"):
        chosen = runs.recipe(make_recipe, 2, {"schedule": schedule}, plugins=recompute)
        runs.assert_equal(chosen, 2, wanted, {"builds": models.Builds()})


def test_beside_data_parallel(make_recipe):
    """Two pipelines on two parts of the batch have the numbers of two processes."""
    observers = {"builds": models.Builds()}
    wanted = runs.record_ranks(runs.recipe(make_recipe, 2), 2, observers)[0]
    chosen = runs.recipe(make_recipe, 4, {"schedule": "1f1b"}, ranks=2)
    runs.assert_equal(chosen, 4, wanted, observers)


@pytest.mark.parametrize("sequence", [False, True])
def test_beside_tensor_parallel(make_recipe, sequence):
    """Stages whose ranks have parts of tokens draw for all of them; recomputed too."""
    model = {"num_attention_heads": 4, "num_key_value_heads": 2}
    plan = {"model.embed_tokens": "outer", "model.embed_tokens.table": "embedding"}
    plugins = {
        "tensor_parallel": {"sequence_parallel": sequence, "plan": plan}, "recompute": {"mode": "full"}, "ddp": None,
    }  # fmt: skip
    degrees = {"pipeline_parallel": 2, "tensor_parallel": 2}
    chosen = runs.recipe(make_recipe, 4, {"schedule": "zb_h1"}, ranks=2, model=model, plugins=plugins, parallel=degrees)
    runs.assert_equal(chosen, 4, alone(make_recipe, model=model), {"builds": models.Builds()})


def test_evaluation_draws_nothing(make_recipe, tmp_path):
    """Before the first step, and between steps, on stages as in one process."""
    found = []
    for world_size, options in ((1, None), (2, {"schedule": "1f1b"})):
        resolved = runs.recipe(make_recipe, world_size, options)
        data = resolved.tree["data"] | {"validation_fraction": 0.2}
        resolved = runs.recipe(make_recipe, world_size, options, data=data, training=EVALUATES)
        found.append(losses(resolved, world_size, tmp_path / str(world_size), {"builds": models.Builds()}))
    assert len(found[0]) == 3
    assert found[1] == pytest.approx(found[0], rel=1e-12)


def test_draws_between_layers_are_refused(make_recipe):
    """The second stage would go on from other numbers than one process, which the first window says."""
    observers = {"builds": models.Builds(models.EarlyDecoder)}
    with pytest.raises(RankFailed) as caught:
        runs.record_ranks(runs.recipe(make_recipe, 2, {}), 2, observers)
    text = str(caught.value)
    assert "RecipeError" in text and "random numbers in front of layer 3" in text and "stage 1 begins there" in text
