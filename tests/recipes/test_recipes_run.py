"""Every shipped recipe is legal as it stands, and trains: whole where it is small, with a smaller model where not."""

from pathlib import Path

import pytest

from camshaft.data import prepare
from camshaft.recipe import check, load
from camshaft.testing.compare import assert_within, compare
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
TWINS = {"llama3_8b_64gpu.yaml": "llama3_tiny_8ranks.yaml"}
"""Recipes for a cluster that another one stands for here: the same plugins along the same axes, a smaller model."""
TINY = "llama3_tiny_8ranks.yaml"
ALONE = (
    "parallel.tensor_parallel=1", "parallel.pipeline_parallel=1", "parallel.data_parallel=auto", "launch.processes=1",
    "plugins.tensor_parallel=null", "plugins.pipeline=null", "plugins.zero=null",
)  # fmt: skip
"""What makes one plain process of it."""


def test_the_table_names_recipes_that_exist():
    assert set(SMALLER) | set(TWINS) | set(TWINS.values()) <= set(RECIPES) and "quickstart.yaml" in RECIPES


@pytest.mark.parametrize(("large", "small"), TWINS.items())
def test_a_twin_has_the_same_plugins_along_the_same_axes(large, small):
    one, other = load(FOLDER / large), load(FOLDER / small)
    assert set(one.recipe.plugins) - {"wandb"} == set(other.recipe.plugins)  # a tracker for a large run
    axes = [{axis.name for axis in check(each).require().mesh.axes if axis.degree > 1} for each in (one, other)]
    assert axes[0] == axes[1] == {"pp", "dp", "tp"}
    for name in ("zero", "tensor_parallel", "pipeline"):
        sizes = {"bucket_size_mb", "virtual_stages"}
        kept = [each.recipe.plugins[name].model_dump(exclude=sizes) for each in (one, other)]
        assert kept[0] == kept[1]


@pytest.mark.parametrize("name", RECIPES)
def test_is_legal_as_it_stands(name):
    resolved = load(FOLDER / name)
    assert check(resolved).problems == ()


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in (*TWINS, TINY)])
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


def test_three_axes_on_eight_ranks_train_what_one_process_trains(tmp_path):
    """Interleaved stages, sequence parallel and ZeRO-1 together, clipping active: 1e-12 in fp64."""
    found = []
    for ranks, changes in ((1, ALONE), (8, ())):
        folder = f"run.dir={tmp_path / str(ranks)}"
        more = ("training.max_steps=2", "training.eval_every=2", "plugins.precision.compute=fp64", folder)
        resolved = load(FOLDER / TINY, (*changes, *more))
        prepare(resolved)
        found.append(record_ranks(resolved, ranks))
    (plain,), eight = found
    assert len(plain) == 2 and all(record.norm > 1 for record in plain)
    for records in eight:
        bounds = dict.fromkeys(("gradients", "weights", "norm", "loss"), 1e-12)
        assert_within(compare(records, plain), bounds)
