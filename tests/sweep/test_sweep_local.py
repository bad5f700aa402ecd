"""``camshaft sweep --local``: choice, order, failures, kills, pruning, and one real tiny run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import small_folder
from camshaft.cli import run
from camshaft.errors import CamshaftError, Interrupted, MachineError, RecipeError
from camshaft.sweep import local
from camshaft.sweep.file import read

PROGRAM = Path(__file__).with_name("sweep_program.py")
RECIPE = small_folder.recipe(
    model={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1},
    data={"validation_fraction": 0.2, "sequence_length": 16},
    batch={"micro_batch_size": 2, "global_batch_size": 2},
    training={"max_steps": 4, "log_every": 1, "eval_every": 2, "eval_samples": 4},
    launch={"processes": 1, "device": "cpu", "threads_per_rank": 1},
    plugins={"adamw": {"lr": 1e-3}, "checkpoint": {"every_steps": 2}, "jsonl": {}},
)
SWEEP = """
schema_version: 1
name: rates
recipe: small.yaml
method: bayes
trials: 4
parameters:
  plugins.adamw.lr: {min: 1.0e-4, max: 1.0, log: true}
"""


class NoStop:
    """Nobody asks to stop."""

    requests = 0


class Stops:
    """Is asked to stop while the trial with this number runs."""

    def __init__(self, number, folder):
        self._name, self._notes = f"trial_{number:04d} ", folder / "started"

    @property
    def requests(self):
        return int(self._notes.exists() and self._name in self._notes.read_text())


def toy(words):
    return [sys.executable, str(PROGRAM), *words]


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """``sweep(text)`` writes and reads a sweep's file beside a small recipe."""
    small_folder.enter(tmp_path, monkeypatch)
    small_folder.fill(tmp_path, RECIPE)

    def make(text=SWEEP):
        (tmp_path / "sweep.yaml").write_text(text)
        return read(Path("sweep.yaml"))

    return make


def results(sweep):
    rows = json.loads((sweep.folder / "results.json").read_text())["trials"]
    return [(row["number"], row["state"], row["value"], row["parameters"]) for row in rows]


def started(sweep):
    """(trial, learning rate) of every process that was started, in order."""
    lines = (sweep.folder / "started").read_text().splitlines()
    return [(int(name.removeprefix("trial_")), float(rate)) for name, rate in (line.split() for line in lines)]


def go(sweep, stop=None, **more):
    told = []
    local.run(sweep, stop or NoStop(), told.append, program=toy, **more)
    return told


def test_trials_run_in_order_and_the_best_is_told(sweep):
    found = sweep()
    told = go(found)
    assert [number for number, _ in started(found)] == list(range(4))
    rows = results(found)
    assert [row[:2] for row in rows] == [(number, "complete") for number in range(4)]
    assert [row[3]["plugins.adamw.lr"] for row in rows] == [rate for _, rate in started(found)]
    best = min(rows, key=lambda row: row[2])
    assert f"best         trial {best[0]}" in told[-3]
    assert f"plugins.adamw.lr={best[3]['plugins.adamw.lr']}" in told[-2] and "camshaft train small.yaml" in told[-2]
    assert go(found)[-3] == told[-3] and len(started(found)) == 4  # nothing is left to do


def test_a_folder_or_a_study_that_cannot_be_used_is_one_error(sweep, tmp_path):
    found = sweep()
    (tmp_path / "runs").touch()
    with pytest.raises(MachineError, match=r"cannot be made: Not a directory. Set run.root"):
        go(found)
    (tmp_path / "runs").unlink()
    found.folder.mkdir(parents=True)
    (found.folder / "study.db").write_text("torn")
    with pytest.raises(MachineError, match=r"study.db is no study that can be read \(.*not a database\)"):
        go(found)
    assert (found.folder / "study.db").read_text() == "torn"


def test_steps_that_do_not_meet_the_end_warn_nobody(sweep):
    found = sweep(SWEEP.replace("{min: 1.0e-4, max: 1.0, log: true}", "{min: 0.1, max: 0.35, step: 0.1}"))
    go(found)
    assert {row[3]["plugins.adamw.lr"] for row in results(found)} <= {0.1, 0.2, 0.3}


def test_more_trials_go_on_and_another_sweep_in_the_folder_is_refused(sweep):
    found = sweep()
    go(found)
    before = results(found)
    more = sweep(SWEEP.replace("trials: 4", "trials: 6"))
    go(more)
    assert results(more)[:4] == before and len(results(more)) == 6
    with pytest.raises(RecipeError, match="another name"):
        go(sweep(SWEEP.replace("max: 1.0", "max: 2.0")))


def test_what_is_chosen_follows_from_the_seed(sweep, tmp_path):
    found = sweep()
    go(found)
    other = sweep(SWEEP.replace("name: rates", "name: again"))
    go(other)
    assert [row[2:] for row in results(other)] == [row[2:] for row in results(found)]
    third = sweep(SWEEP.replace("name: rates", "name: third\nseed: 1"))
    go(third)
    assert started(third)[0][1] != started(found)[0][1]


def test_a_sweep_that_was_stopped_goes_on_as_if_nothing_had_happened(sweep, monkeypatch):
    whole = sweep(SWEEP.replace("name: rates", "name: whole"))
    go(whole)
    found = sweep()
    monkeypatch.setenv("SWEEP_MODE", "hangs in trial 2")
    with pytest.raises(Interrupted, match="trial 2; the same command goes on"):
        go(found, Stops(2, found.folder))
    assert [number for number, _ in started(found)] == [0, 1, 2]
    monkeypatch.delenv("SWEEP_MODE")
    told = go(found)
    assert told[0].startswith("trial 2 again: plugins.adamw.lr=")
    assert [number for number, _ in started(found)] == [0, 1, 2, 2, 3]
    assert results(found) == results(whole)


def test_a_sweep_that_was_killed_waits_for_its_trial_and_goes_on(sweep, tmp_path):
    """The killed sweep's trial lives on: it is a session of its own, and holds its folder until it ends."""
    found = sweep()
    notes = found.folder / "started"
    script = (
        "import sys; from pathlib import Path; from camshaft.sweep import local; from camshaft.sweep.file import read\n"
        "class Stop: requests = 0\n"
        f"program = lambda words: [sys.executable, {str(PROGRAM)!r}, *words]\n"
        "local.run(read(Path('sweep.yaml')), Stop(), print, program=program)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "SWEEP_MODE": "slow"}) as process:
        deadline = time.monotonic() + 60
        while not (notes.exists() and "trial_0001" in notes.read_text()):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    told = go(found)
    assert any("waiting" in line and "trial_0001 is in use" in line for line in told)
    rows = results(found)
    assert [row[:2] for row in rows] == [(number, "complete") for number in range(4)]
    begun = started(found)
    assert [number for number, _ in begun if number > 1] == [2, 3]
    assert len({rate for number, rate in begun if number == 1}) == 1  # with the values that it had


def test_failed_trials_are_told_and_the_others_go_on(sweep, monkeypatch):
    monkeypatch.setenv("SWEEP_MODE", "fails in trial 1")
    found = sweep()
    told = go(found)
    assert any("trial 1: status 4: error: out of memory" in line for line in told)
    assert [row[1] for row in results(found)] == ["complete", "fail", *["complete"] * 2]
    assert results(found)[1][2] is None


@pytest.mark.parametrize(("mode", "reason"), [("always fails", "status 5"), ("no number", "became NaN or infinite")])
def test_a_sweep_without_any_value_ends_with_status_1(sweep, monkeypatch, mode, reason):
    monkeypatch.setenv("SWEEP_MODE", mode)
    found, told = sweep(SWEEP.replace("trials: 4", "trials: 2")), []
    with pytest.raises(CamshaftError, match="none of 2 trials") as caught:
        local.run(found, NoStop(), told.append, program=toy)
    assert caught.value.exit_status == 1
    assert sum(reason in line for line in told) == 2


GRID = """
schema_version: 1
name: grid
recipe: small.yaml
method: grid
metric: {name: eval/loss, goal: maximize, of: max}
parameters:
  training.max_steps: {min: 2, max: 6, step: 2}
  plugins.adamw.lr: {values: [0.1, 0.01]}
"""


def test_a_grid_is_every_combination_in_order(sweep):
    found = sweep(GRID)
    assert found.total == 6
    go(found)
    chosen = [(row[3]["training.max_steps"], row[3]["plugins.adamw.lr"]) for row in results(found)]
    assert chosen == [(2, 0.1), (2, 0.01), (4, 0.1), (4, 0.01), (6, 0.1), (6, 0.01)]
    assert results(found)[0][2] == pytest.approx(2.0)  # the largest of 1 + 1/step


@pytest.mark.parametrize("chosen", [0, 1])
def test_a_sweep_that_was_killed_while_it_chose_values_tries_all_of_them(sweep, chosen):
    """The trial that was begun has none of its values, or one of two."""
    found = sweep(GRID)
    found.folder.mkdir(parents=True)
    begun = local.Runner(found, NoStop(), print, toy)
    first = begun.study.ask()
    first.suggest_int("training.max_steps", 2, 6, step=2) if chosen else None
    told = go(found)
    assert any("trial 0: ended before it began" in line for line in told)
    rows = [row for row in results(found) if row[1] == "complete"]
    tried = [(row[3]["training.max_steps"], row[3]["plugins.adamw.lr"]) for row in rows]
    assert tried == [(2, 0.1), (2, 0.01), (4, 0.1), (4, 0.01), (6, 0.1), (6, 0.01)]


def test_trials_worse_than_the_median_are_stopped(sweep, monkeypatch):
    monkeypatch.setenv("SWEEP_MODE", "slow")
    found = sweep(
        """
schema_version: 1
name: pruned
recipe: small.yaml
method: random
trials: 5
seed: 3
pruning: {startup_trials: 2}
parameters:
  plugins.adamw.lr: {min: 1.0e-4, max: 1.0, log: true}
"""
    )
    told = go(found)
    states = [row[1] for row in results(found)]
    assert states[:2] == ["complete", "complete"] and "pruned" in states
    assert any("worse than the median" in line for line in told)
    best = min(row[2] for row in results(found) if row[1] == "complete")
    for number, state, _, parameters in results(found):
        if state == "pruned":
            rate = parameters["plugins.adamw.lr"]
            full = json.loads((found.folder / f"trial_{number:04d}" / "metrics.jsonl").read_text().splitlines()[0])
            assert full["eval/loss"] > best and rate > 0


def test_without_optuna_it_is_said_what_to_install(sweep, monkeypatch, capsys):
    sweep()
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert run(["sweep", "sweep.yaml", "--local"]) == 3
    assert "pip install 'camshaft[sweep]'" in capsys.readouterr().err


def test_two_processes_cannot_run_one_sweep(sweep):
    found = sweep()
    found.folder.mkdir(parents=True)
    lock = local.Lock(found.folder)
    try:
        with pytest.raises(MachineError, match="in use by process"):
            go(found)
    finally:
        lock.release()


def test_a_real_sweep_of_a_tiny_model(sweep, capfd):
    sweep(SWEEP.replace("trials: 4", "trials: 2").replace("max: 1.0,", "max: 1.0e-2,"))
    assert run(["sweep", "sweep.yaml", "--local"]) == 0
    shown = capfd.readouterr().out
    folder = Path("runs") / "sweep-rates"
    rows = json.loads((folder / "results.json").read_text())["trials"]
    for row in rows:
        trial = folder / f"trial_{row['number']:04d}"
        records = [json.loads(line) for line in (trial / "metrics.jsonl").read_text().splitlines()]
        assert row["value"] == [record["eval/loss"] for record in records if "eval/loss" in record][-1]
        text = (trial / "resolved.yaml").read_text()
        assert "lr: " in text and json.loads((trial / "status.json").read_text())["state"] == "finished"
    assert len({row["parameters"]["plugins.adamw.lr"] for row in rows}) == 2
    assert "best         trial" in shown
    assert not (Path("runs") / "small").exists()  # no trial is taken for a run of the recipe by itself
