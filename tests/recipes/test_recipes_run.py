"""Every shipped recipe is legal as it stands, and trains: whole where it is small, with a smaller model where not."""

from pathlib import Path

import pytest

from camshaft.data import prepare
from camshaft.recipe import check, load
from camshaft.testing.run import record_ranks

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(path.name for path in FOLDER.glob("*.yaml"))
SMALLER = {
    "llama3_8b_ddp.yaml": (
        "model.preset=llama-nano",
        "tokenizer.vocab_size=1024",
        "data.train=python-docs",
        "data.sequence_length=64",
        "batch.global_batch_size=8",
        "training.eval_every=2",
        "training.eval_samples=4",
        "launch.processes=2",
        "plugins.lr_schedule.warmup_steps=1",
    )
}
"""What a recipe for a cluster needs to run on this machine; its plugins and their options stay."""


def test_the_table_names_recipes_that_exist():
    assert set(SMALLER) <= set(RECIPES) and "quickstart.yaml" in RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_is_legal_as_it_stands(name):
    resolved = load(FOLDER / name)
    assert check(resolved).problems == ()


@pytest.mark.parametrize("name", RECIPES)
def test_trains_two_steps(name, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    changes = [*SMALLER.get(name, ()), f"run.dir={tmp_path / 'run'}", "launch.device=cpu", "training.log_every=1"]
    if load(FOLDER / name, changes).recipe.training.max_steps is not None:
        changes.append("training.max_steps=2")
    resolved = load(FOLDER / name, changes)
    prepare(resolved)
    processes = resolved.recipe.launch.processes
    assert isinstance(processes, int)
    ranks = record_ranks(resolved, processes)
    assert len(ranks) == processes and len(ranks[0]) >= 2
    first, last = ranks[0][0], ranks[0][-1]
    assert any(not first.weights[key].equal(last.weights[key]) for key in first.weights)
