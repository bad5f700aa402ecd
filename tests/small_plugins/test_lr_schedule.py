"""Learning-rate factors: exact values at the ends, shape in between, options that would do nothing refused."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest

from camshaft.claims import PlanContext
from camshaft.errors import RecipeError
from camshaft.mesh import MeshShape
from camshaft.recipe.schema import Batch, Parallel, Recipe, Training
from camshaft_lr_schedule import Options, Plugin
from camshaft_lr_schedule.shapes import factor


def curve(total=100, **options):
    return [factor(Options(**options), step, total) for step in range(total)]


@pytest.mark.parametrize("kind", ["cosine", "linear", "exponential", "wsd"])
@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_ends(kind, warmup):
    values = curve(type=kind, warmup_steps=warmup, min_lr_ratio=0.1)
    assert max(values) == pytest.approx(1.0)
    assert values[-1] == pytest.approx(0.1, rel=1e-12)
    if warmup:
        assert values[0] == pytest.approx(1 / warmup) and values[warmup - 1] == 1.0
    after = values[warmup:]
    assert all(a >= b - 1e-15 for a, b in pairwise(after)), "never rises after the warm-up"


def test_middle_of_each_shape():
    assert curve(101, type="linear", min_lr_ratio=0.0)[50] == pytest.approx(0.5)
    assert curve(101, type="cosine", min_lr_ratio=0.2)[25] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert curve(101, type="exponential", min_lr_ratio=0.01)[50] == pytest.approx(0.1)


def test_wsd_is_flat_then_falls_over_its_part():
    values = curve(100, type="wsd", warmup_steps=10, min_lr_ratio=0.0, wsd_decay_ratio=0.2)
    assert set(values[10:80]) == {1.0} and values[80] == pytest.approx(0.95) and values[99] == 0.0


def test_constant_stays():
    assert set(curve(50, type="constant", warmup_steps=5)[5:]) == {1.0}


def test_after_its_decay_a_schedule_stays_at_its_floor():
    values = curve(100, type="cosine", decay_steps=20, min_lr_ratio=0.3)
    assert values[19] == pytest.approx(0.3) and set(values[19:]) == {values[19]}


def test_a_warmup_may_be_a_part_of_the_run():
    assert curve(40, type="cosine", warmup_ratio=0.25) == curve(40, type="cosine", warmup_steps=10)
    assert factor(Options(warmup_ratio=0.15), 0, 2) > 0


def test_a_run_of_one_step_has_a_rate():
    for kind in ("cosine", "linear", "exponential", "wsd", "constant"):
        assert 0 < factor(Options(type=kind), 0, 1) <= 1


def problems(steps, **options):
    recipe = Recipe(
        schema_version=1,
        name="r",
        batch=Batch(micro_batch_size=1, global_batch_size=1),
        training=Training(max_steps=steps),
    )
    plugin = Plugin(Options(**options))
    plugin.name = "lr_schedule"
    return plugin.plan(PlanContext(recipe, MeshShape.of(Parallel(), 1), ("lr_schedule",), "cpu")).problems


def test_options_that_do_nothing_or_cannot_work_are_refused():
    assert problems(100, type="cosine", warmup_steps=10) == ()
    assert problems(10, warmup_steps=10)[0].key == "plugins.lr_schedule.warmup_steps"
    assert problems(10, type="exponential", min_lr_ratio=0.0)[0].key == "plugins.lr_schedule.min_lr_ratio"
    assert problems(10, type="cosine", wsd_decay_ratio=0.5)[0].key == "plugins.lr_schedule.wsd_decay_ratio"
    assert problems(10, warmup_steps=1, warmup_ratio=0.1)[0].key == "plugins.lr_schedule.warmup_ratio"
    assert problems(10, type="wsd", decay_steps=5)[0].key == "plugins.lr_schedule.decay_steps"
    assert problems(10, type="wsd", warmup_steps=9)[0].key == "plugins.lr_schedule.wsd_decay_ratio"
    assert problems(10, type="wsd", warmup_ratio=0.9)[0].key == "plugins.lr_schedule.wsd_decay_ratio"
    assert problems(10, type="wsd", warmup_steps=8) == ()
    assert [
        p.key.rsplit(".", 1)[1] for p in problems(10, type="constant", warmup_steps=2, min_lr_ratio=0.5, decay_steps=3)
    ] == [
        "decay_steps",
        "min_lr_ratio",
    ]


def test_a_warmup_is_held_against_the_length_that_only_the_data_told():
    plugin = Plugin(Options(warmup_steps=20))
    plugin.name = "lr_schedule"
    plugin.bind(SimpleNamespace(world=SimpleNamespace(total_steps=21)))
    assert plugin.lr(20) == 1.0
    with pytest.raises(RecipeError, match="a warm-up of 20 steps does not end within the run's 20 steps"):
        plugin.bind(SimpleNamespace(world=SimpleNamespace(total_steps=20)))


@pytest.mark.parametrize(("length", "last"), [(1, 0), (2, 1), (7, 6)])
def test_a_decay_starts_at_the_peak_and_takes_its_steps(length, last):
    values = curve(20, type="linear", warmup_steps=3, decay_steps=length, min_lr_ratio=0.5)
    assert values[2:4] == [1.0, 1.0]
    assert values[3 + last] == (0.5 if length > 1 else 1.0)
    assert values[3 + length :] == [0.5] * (17 - length)
