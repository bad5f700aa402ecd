"""Settings that cannot have an effect, found before anything runs."""

from pathlib import Path

import pytest

from camshaft.cli import run
from camshaft.recipe import check, load

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"


def problems(world_size, *overrides):
    return check(load(QUICKSTART, overrides, world_size=world_size), world_size).problems


def test_auto_means_as_many_ranks_as_there_are():
    assert problems(1) == () and problems(2) == ()
    assert problems(1, "parallel.data_parallel_shard=1") == ()


@pytest.mark.parametrize(
    "overrides",
    [
        ("parallel.data_parallel=1",),
        ("parallel.data_parallel_shard=1", "parallel.data_parallel_replicate=1"),
    ],
)
def test_a_recipe_that_asks_for_one_data_rank_and_for_data_parallel_contradicts_itself(overrides):
    (problem,) = problems(1, *overrides)
    assert problem.key == "plugins.ddp" and "gives that axis one rank" in problem.message
    assert "remove plugins.ddp" in problem.fix and "parallel.data_parallel=auto" in problem.fix
    assert problems(1, *overrides, "plugins.ddp=null") == ()


def test_validate_tells_it(capsys):
    assert run(["validate", str(QUICKSTART), "launch.processes=1", "parallel.data_parallel=1"]) == 2
    assert "plugins.ddp: 'ddp' works along the data axis alone" in capsys.readouterr().err


def test_decay_of_embeddings_needs_decay():
    given = ["plugins.adamw.weight_decay=0"]
    assert problems(2, *given) == () and problems(2, *given, "plugins.adamw.decay_embeddings=false") == ()
    (problem,) = problems(2, *given, "plugins.adamw.decay_embeddings=true")
    assert problem.key == "plugins.adamw.decay_embeddings" and "does nothing without weight decay" in problem.message
    assert problems(2, "plugins.adamw.decay_embeddings=true") == ()


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ("type: constant", True),
        ("type: constant, warmup_steps: 1", True),
        ("type: constant, warmup_ratio: 0.0", True),
        ("type: cosine, min_lr_ratio: 1.0", True),
        ("type: wsd, min_lr_ratio: 1.0", True),
        ("type: constant, warmup_steps: 2", False),
        ("type: constant, warmup_ratio: 0.5", False),
        ("type: cosine, min_lr_ratio: 1.0, warmup_steps: 2", False),
        ("type: wsd", False),
        ("type: linear, min_lr_ratio: 0.9", False),
    ],
)
def test_a_schedule_that_never_changes_the_rate_is_refused(options, refused):
    found = problems(2, "plugins.lr_schedule=null", f"plugins.lr_schedule={{{options}}}")
    assert [problem.key for problem in found] == (["plugins.lr_schedule"] if refused else [])
    assert all("has the factor 1 in every step" in problem.message for problem in found)


def test_a_schedule_that_a_short_run_does_not_reach_is_no_fault():
    assert problems(2, "training.max_steps=1", "plugins.lr_schedule=null", "plugins.lr_schedule={type: cosine}") == ()


def test_such_a_schedule_would_change_nothing_in_a_run_of_any_length():
    from camshaft_lr_schedule import Options
    from camshaft_lr_schedule.shapes import factor

    for options in (Options(type="constant"), Options(type="wsd", min_lr_ratio=1.0, warmup_steps=1)):
        assert {factor(options, step, 50) for step in range(50)} == {1.0}
    assert {factor(Options(type="constant", warmup_steps=2), step, 50) for step in range(50)} == {0.5, 1.0}
