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
