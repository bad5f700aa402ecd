"""The file of a sweep: what is refused, with its line; and the same sweep for W&B's agents."""

from pathlib import Path

import pytest
import yaml
from test_sweep_local import RECIPE, SWEEP

from camshaft.cli import run
from camshaft.errors import RecipeError
from camshaft.recipe import load
from camshaft.sweep.agents import config
from camshaft.sweep.file import read
from camshaft.sweep.values import changes

LINES = SWEEP.splitlines()


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(RECIPE)
    (tmp_path / "text.jsonl").write_text('{"text": "lorem"}\n')

    def make(text=SWEEP):
        (tmp_path / "sweep.yaml").write_text(text)
        return Path("sweep.yaml")

    return make


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("method: bayes", "methd: bayes", 5, ["methd", "method"]),
        ("method: bayes", "method: hyperband", 5, ["method", "bayes"]),
        ("trials: 4", "trials: 0", 6, ["trials"]),
        ("trials: 4\n", "", None, ["trials", "unless method is grid"]),
        ("log: true", "logg: true", 8, ["logg", "log"]),
        ("min: 1.0e-4", "min: 2.0", 8, ["not below max"]),
        ("min: 1.0e-4", "min: -1.0", 8, ["above 0"]),
        ("log: true", "log: true, step: 0.1", 8, ["exclude each other"]),
        ("method: bayes", "method: grid", 8, ["a grid needs a step or values"]),
        ("plugins.adamw.lr: ", "plugins.adamw.rate: ", 8, ["rate", "lr"]),
        ("plugins.adamw.lr: ", "plugins.sgd.lr: ", 8, ["'adamw' and 'sgd' both own the slot 'optimizer'"]),
        (
            LINES[-1],
            "  batch.micro_batch_size: {values: [1, 3, 2]}",
            8,
            ["micro_batch_size: 3 is refused", "not whole"],
        ),
        ("{min: 1.0e-4, max: 1.0, log: true}", "{values: [0.1, fast, 0.2]}", 8, ["fast is refused: must be a number"]),
        ("{min: 1.0e-4, max: 1.0, log: true}", "{min: 0, max: 1, step: 1.0e-9}", 8, ["make 1,000,000,001 values"]),
        ("plugins.adamw.lr: ", "run.dir: ", 8, ["may set"]),
        ("{min: 1.0e-4, max: 1.0, log: true}", "{values: [1.0e-3, 1.0e-3]}", 8, ["twice"]),
        ("{min: 1.0e-4, max: 1.0, log: true}", "{values: [fast]}", 8, ["lr", "must be a number"]),
        ("recipe: small.yaml", "recipe: other.yaml", 4, ["there is no file 'other.yaml'"]),
        ("trials: 4", "trials: 4\noverrides: [nosuch=1]", 7, ["overrides.0", "unknown key 'nosuch'"]),
        ("trials: 4", "trials: 4\noverrides: [seed=1, trainig]", 7, ["overrides.1", "not a usable override"]),
        ("trials: 4", "trials: 4\noverrides: [run.root=x]", 7, ["sets this for each trial"]),
        ("trials: 4", "trials: 4\noverrides: [plugins.jsonl=null]", 4, ["metrics.jsonl"]),
        ("trials: 4", "trials: 4\noverrides: [training.eval_every=null]", None, ["eval_every"]),
    ],
)
def test_faults_are_told_with_place_and_fix(write, old, new, line, words):
    text = SWEEP.replace(old, new)
    assert text != SWEEP
    with pytest.raises(RecipeError) as caught:
        read(write(text))
    told = str(caught.value)
    assert all(word in told for word in words), told
    if line is not None:
        assert f"sweep.yaml:{line}:" in told


def test_faults_end_the_command_with_status_2(write, capsys):
    write(SWEEP.replace("trials: 4", "trails: 6"))
    assert run(["sweep", "sweep.yaml"]) == 2
    assert "sweep.yaml:6: trails" in capsys.readouterr().err


def test_a_value_is_legal_that_fits_one_end_of_the_other_parameters(write):
    both = "  batch.micro_batch_size: {values: [2, 3]}\n  batch.global_batch_size: {values: [4, 6]}"
    assert read(write(SWEEP.replace(LINES[-1], both))).total == 4


def test_a_fault_of_the_recipe_keeps_its_place(write, tmp_path):
    path = write()
    (tmp_path / "small.yaml").write_text(RECIPE.replace("global_batch_size: 2", "global_batch_size: 3"))
    with pytest.raises(RecipeError) as caught:
        read(path)
    line = 1 + RECIPE.splitlines().index("  global_batch_size: 2")
    assert str(caught.value).startswith(f"small.yaml:{line}: batch.global_batch_size: ")
    assert len(caught.value.problems) == 1


def test_steps_are_decimal(write):
    span = read(write(SWEEP.replace("{min: 1.0e-4, max: 1.0, log: true}", "{min: 0.1, max: 0.35, step: 0.1}")))
    assert span.file.parameters["plugins.adamw.lr"].grid() == [0.1, 0.2, 0.3]


def test_no_file_is_replaced_but_ones_own(write, capsys):
    write()
    kept = Path("small.yaml").read_text()
    assert run(["sweep", "sweep.yaml", "--output", "small.yaml"]) == 2
    assert "is no sweep for W&B's agents" in capsys.readouterr().err and Path("small.yaml").read_text() == kept
    assert [run(["sweep", "sweep.yaml"]) for _ in range(2)] == [0, 0]


def test_values_are_overrides_that_read_back(write):
    values = {"plugins.adamw.lr": 1e-7, "training.max_steps": 7, "training.deterministic": True}
    recipe = load(write().parent / "small.yaml", changes(values)).recipe
    assert (recipe.plugins["adamw"].lr, recipe.training.max_steps, recipe.training.deterministic) == (1e-7, 7, True)


MANY = """
schema_version: 1
name: many
recipe: small.yaml
overrides: [training.max_steps=8]
method: random
trials: 20
metric: {name: train/loss, goal: minimize, of: min}
pruning: {warmup_steps: 100}
parameters:
  plugins.adamw.lr: {min: 1.0e-4, max: 1.0, log: true}
  plugins.adamw.weight_decay: {min: 0.0, max: 0.2}
  training.log_every: {min: 1, max: 8}
  batch.micro_batch_size: {min: 1, max: 2, log: true}
  training.eval_samples: {min: 16, max: 96, step: 32}
  seed: {values: [0, 1, 2]}
"""


def test_the_file_for_agents_is_the_same_sweep(write, capsys):
    write(MANY)
    assert run(["sweep", "sweep.yaml"]) == 0
    written = Path("sweep.wandb.yaml").read_text()
    assert "wandb sweep sweep.wandb.yaml" in capsys.readouterr().out
    assert "not at its min" in written
    found = yaml.safe_load(written)
    assert found == config(read(Path("sweep.yaml")))
    assert found["command"] == [
        "${env}", "${interpreter}", "-m", "camshaft", "train", "small.yaml", "training.max_steps=8",
        "${args_no_hyphens}",
    ]  # fmt: skip
    assert found["metric"] == {"name": "train/loss", "goal": "minimize"}
    assert (found["method"], found["run_cap"]) == ("random", 20)
    assert found["early_terminate"] == {"type": "hyperband", "min_iter": 100}
    assert found["parameters"] == {
        "plugins.adamw.lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1.0},
        "plugins.adamw.weight_decay": {"distribution": "uniform", "min": 0.0, "max": 0.2},
        "training.log_every": {"distribution": "int_uniform", "min": 1, "max": 8},
        "batch.micro_batch_size": {"distribution": "q_log_uniform_values", "q": 1, "min": 1, "max": 2},
        "training.eval_samples": {"values": [16, 48, 80]},
        "seed": {"values": [0, 1, 2]},
    }


def test_what_wandbs_agent_starts_is_ours_with_its_values(write):
    """W&B's own code puts an agent's choice into the command."""
    from wandb.sdk.launch.sweeps import utils

    write(MANY)
    assert run(["sweep", "sweep.yaml"]) == 0
    found = yaml.safe_load(Path("sweep.wandb.yaml").read_text())
    chosen = {"plugins.adamw.lr": 2.5e-05, "training.deterministic": True, "seed": 2, "training.log_every": 4}
    words = utils.create_sweep_command_args({"args": {key: {"value": value} for key, value in chosen.items()}})
    command = [
        word
        for part in utils.create_sweep_command(found["command"])
        for word in (words["args_no_hyphens"] if part == "${args_no_hyphens}" else [part])
    ]
    assert command[2:5] == ["-m", "camshaft", "train"]
    recipe = load(command[5], command[6:]).recipe
    assert (recipe.plugins["adamw"].lr, recipe.training.deterministic, recipe.seed) == (2.5e-05, True, 2)
    assert (recipe.training.log_every, recipe.training.max_steps) == (4, 8)


def test_null_is_for_local_sweeps_alone(write, capsys):
    write(
        SWEEP.replace(
            "plugins.adamw.lr: {min: 1.0e-4, max: 1.0, log: true}", "training.eval_every: {values: [1, null]}"
        )
    )
    assert read(Path("sweep.yaml")).total == 4
    assert run(["sweep", "sweep.yaml"]) == 2
    assert "--local" in capsys.readouterr().err
