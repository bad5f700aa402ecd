"""Artifacts, tables, drawings and alerts, against the real wandb in offline mode, read back from its run file."""

from __future__ import annotations

import json
import math
import os
import time

import pytest
from tracking_records import eval_record, train_record
from wandb_file import run_files

from camshaft_wandb import Options, Plugin, client
from camshaft_wandb.alerts import Alerts, Watch
from camshaft_wandb.papers import ledger_rows, plan_line

RECIPE = """
schema_version: 1
name: quickstart
model: {preset: llama-tiny}
tokenizer: {type: byte}
batch: {micro_batch_size: 1, global_batch_size: 2}
training: {max_steps: 5}
plugins: {ddp: {}, adamw: {lr: 1e-3}}
"""
LEDGER = {
    "plugin/ledger/ddp/dp/all_reduce/bytes_per_step": 4096.0,
    "plugin/ledger/ddp/dp/all_reduce/calls_per_step": 2.0,
    "plugin/ledger/zero/dp/all_gather/bytes_per_step": 8192.0,
    "plugin/ledger/zero/dp/all_gather/calls_per_step": 1.0,
    "plugin/ledger/bytes_per_step": 12288.0,
    "plugin/ledger/calls_per_step": 3.0,
}
KEY = "canary5ecre7" + "0" * 28


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """No key, no settings and no mode of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    (tmp_path / "home").mkdir()


def record(state, records, **options):
    """One run through all hooks; what its run file holds."""
    plugin = Plugin(Options(system_metrics=False, close_timeout_s=30, mode="offline", **options))
    plugin.pre_run(state)
    for each in records:
        plugin.log(state, each)
    plugin.close(state, "finished")
    (found,) = run_files(state.world.run.path)
    return found


def until_recorded(plugin):
    deadline = time.monotonic() + 20
    while plugin._client._records:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def started(run, recipe="recipe.yaml"):
    """What ``train`` leaves when it starts a run."""
    (run / "recipe.yaml").write_text(RECIPE)
    (run / "resolved.yaml").write_text(f"{RECIPE}# {KEY}\n")
    command = f"deepspeed --num_gpus 2 --no_local_rank --module camshaft train {run / recipe} training.max_steps=7"
    (run / "status.json").write_text(json.dumps({"command": command, "world_size": 2, "certificate": None}))


def test_papers_go_along_on_demand(make_state, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    state = make_state()
    run = state.world.run.path
    started(run)
    (run / "certificate.json").write_text('{"result": "passed"}\n')
    (run / "ledger.json").write_text('{"rows": []}\n')
    (run / "pipeline.svg").write_text("<svg><text>1F1B</text></svg>")
    wanted = ["recipe", "certificate", "plan", "ledger", "schedule"]
    found = record(
        state, [train_record(10, **LEDGER), eval_record(10)], artifacts=wanted, group="scaling", job_type="ablation"
    )
    assert (found.group, found.job_type) == ("scaling", "ablation")
    papers = found.artifacts
    assert papers["recipe:quickstart-recipe"] == {
        "recipe.yaml": RECIPE,
        "resolved.yaml": f"{RECIPE}# [removed]\n",  # a key that got into a file leaves the machine in none
    }
    assert papers["certificate:quickstart-certificate"] == {"certificate.json": '{"result": "passed"}\n'}
    plan = papers["plan:quickstart-plan"]["plan.txt"]
    assert "phases, in order" in plan and "= 2 rank(s)" in plan
    assert papers["ledger:quickstart-ledger"] == {"ledger.json": '{"rows": []}\n'}
    assert papers["schedule:quickstart-schedule"] == {"pipeline.svg": "<svg><text>1F1B</text></svg>"}
    (table,) = (
        json.loads(files["ledger.table.json"]) for name, files in papers.items() if name.startswith("run_table")
    )
    assert table["columns"] == ["plugin", "axis", "operation", "calls a step", "bytes a step"]
    assert table["data"] == [["zero", "dp", "all_gather", 1.0, 8192.0], ["ddp", "dp", "all_reduce", 2.0, 4096.0]]
    (drawing,) = (row["schedule/pipeline.path"] for row in found.history if "schedule/pipeline.path" in row)
    (files,) = (run / "wandb").glob("offline-run-*/files")
    assert (files / drawing).read_text() == "<svg><text>1F1B</text></svg>"
    assert not list((run.parent / "home").rglob("artifacts"))  # what waits for its upload stays in the run directory


def test_a_certificate_that_only_the_status_tells_of_goes_along(make_state):
    state = make_state()
    proof = {"result": "passed", "valid_for": "0123"}
    (state.world.run.path / "status.json").write_text(json.dumps({"certificate": proof}))
    (files,) = record(state, [train_record(10)], artifacts=["certificate"]).artifacts.values()
    assert json.loads(files["certificate.json"]) == proof


def test_without_the_option_nothing_goes_along(make_state):
    state = make_state()
    started(state.world.run.path)
    found = record(state, [train_record(10, **LEDGER)])
    assert found.artifacts == {} and found.alerts == []


def test_papers_that_are_not_there_are_told_of_and_change_nothing(make_state, caplog):
    state = make_state()
    wanted = ["recipe", "certificate", "plan", "ledger", "schedule"]
    found = record(state, [train_record(10)], artifacts=wanted)
    assert found.artifacts == {} and [row["progress/global_step"] for row in found.history] == [10]
    for words in ("no recipe.yaml", "camshaft verify", "not started by", "add plugins.ledger", "drawing of a schedule"):
        assert words in caplog.text


def test_a_plan_that_cannot_be_made_is_told_at_the_end(make_state, caplog):
    state = make_state()
    started(state.world.run.path, recipe="gone.yaml")
    found = record(state, [train_record(10)], artifacts=["plan"])
    assert found.artifacts == {} and [row["progress/global_step"] for row in found.history] == [10]
    assert "refused 1 call(s)" in caplog.text and "gone.yaml" in caplog.text


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("torchrun --nproc-per-node 2 -m camshaft train 'a b.yaml' x.y=1", ["a b.yaml", "x.y=1", "--world-size", "2"]),
        ("python -m camshaft train r.yaml --fresh", ["r.yaml", "--world-size", "2"]),
        ("torchrun train.py", None),
        ("python -m camshaft train 'r.yaml", None),
        ("", None),
    ],
)
def test_the_plan_is_of_what_was_started(command, words):
    line = plan_line(command, 2)
    assert (line[line.index("plan") + 1 :] if line else None) == words


def test_ledger_rows_leave_out_sums_and_other_plugins():
    assert (
        ledger_rows({"plugin/ledger/bytes_per_step": 1.0, "plugin/other/a/b/c/bytes_per_step": 1.0, "train/loss": 1})
        == []
    )


class TestAlerts:
    def watch(self, **options):
        return Watch(Alerts(**options), "run")

    def titles(self, watch, losses):
        found = []
        for step, loss in enumerate(losses, 1):
            alerts = watch.observe({"train/loss": loss, "progress/global_step": step})
            found += [(step, alert.title, alert.level) for alert in alerts]
        return found

    def test_a_loss_that_is_no_number_is_told_once(self):
        assert self.titles(self.watch(), [5.0, math.nan, math.nan]) == [(2, "train/loss is nan", "ERROR")]
        assert self.titles(self.watch(), [math.inf]) == [(1, "train/loss is inf", "ERROR")]
        assert self.titles(self.watch(non_finite=False), [math.nan]) == []

    def test_a_jump_is_told_once_until_it_is_over(self):
        losses = [5.0] * 12 + [9.0, 9.0, 5.0, 9.0]
        jump = ("The loss has jumped", "WARN")
        assert self.titles(self.watch(), losses) == [(13, *jump), (16, *jump)]
        assert self.titles(self.watch(spike=2.0), losses) == []
        assert self.titles(self.watch(spike=None), losses) == []

    def test_the_beginning_and_a_new_level_are_no_jumps(self):
        assert self.titles(self.watch(), [1.0] * 9 + [100.0]) == []  # too few to compare with
        told = self.titles(self.watch(), [4.0] * 60 + [7.0] * 60)
        assert [step for step, *_ in told] == [61]  # a level that stays is usual after half of the window

    def test_silence_is_told_once_until_it_is_over(self):
        watch = self.watch(stall_s=10)
        assert watch.silent(9.9) is None
        assert "10 s" in watch.silent(10.4).text
        assert watch.silent(99) is None
        watch.observe(train_record(3))
        assert "since step 3" in watch.silent(11).text
        assert self.watch(stall_s=None).silent(1e9) is None

    @pytest.mark.parametrize("options", [{"spike": 1.0}, {"stall_s": 0}, {"spkie": 2.0}])
    def test_nonsense_is_refused(self, options):
        with pytest.raises(ValueError, match=next(iter(options))):
            Options(alerts=options)

    def test_they_reach_the_run_file(self, make_state, monkeypatch):
        monkeypatch.setattr(client, "_LOOK_S", 0.05)
        records = [train_record(step) | {"train/loss": 2.0} for step in range(1, 12)]
        records += [train_record(12) | {"train/loss": 4.0}, train_record(13) | {"train/loss": math.nan}]
        state = make_state()
        plugin = Plugin(Options(system_metrics=False, close_timeout_s=30, mode="offline", alerts={"stall_s": 0.3}))
        plugin.pre_run(state)
        for each in records:
            plugin.log(state, each)
        until_recorded(plugin)
        time.sleep(1.0)  # nothing comes: a stall
        plugin.close(state, "failed")
        (found,) = run_files(state.world.run.path)
        assert [(title, level) for title, _, level in found.alerts] == [
            ("The loss has jumped", "WARN"),
            ("train/loss is nan", "ERROR"),
            ("Training has stalled", "WARN"),
        ]
        assert "quickstart (run)" in found.alerts[0][1] and "step 12" in found.alerts[0][1]
        assert len(found.history) == 13
