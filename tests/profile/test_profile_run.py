"""``camshaft profile`` on a real small run: files, sums, what it must leave alone, refusals."""

import ast
import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

import camshaft
import small_folder
from camshaft.cli import profile as command
from camshaft.cli import run
from camshaft.comm import Channel
from camshaft.distributed import Environment
from camshaft.loop import session
from camshaft.profiling.ranges import Modules
from camshaft.profiling.recording import Recorder, Settings
from camshaft.profiling.run import run as profile
from camshaft.profiling.trace import read
from camshaft.recipe import load
from camshaft.rundir import RunDirectory
from camshaft.testing.ranks import run_ranks
from camshaft.testing.run import Quiet
from small_folder import ONE, TWO

RECIPE = small_folder.recipe(
    batch={"micro_batch_size": 2, "global_batch_size": 8},
    training={"max_steps": 3, "log_every": 1},
    launch=TWO,
    plugins={
        "ddp": {"bucket_size_mb": 0.01},
        "adamw": {"lr": 1e-3},
        "clip": {"max_norm": 0.5},
        "checkpoint": {"every_steps": 1},
        "console": {},
        "jsonl": {},
    },
)
SETTINGS = Settings(warmup=2, steps=1)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    small_folder.enter(tmp_path, monkeypatch)
    return small_folder.fill(tmp_path, RECIPE, documents=120)


def rank(number, world_size, path, changes, settings, folder):
    """Profile one forked rank; what it changed while it recorded is as it was."""
    before = (Channel.all_reduce, dist.Work.wait)
    resolved, left_out = command.lean(str(path), changes, world_size)
    environment = Environment(number, number, world_size, world_size, "torchrun" if world_size > 1 else "none")
    words = profile(resolved, environment, RunDirectory(folder).create(), Quiet(), Quiet(), settings, left_out)
    assert (Channel.all_reduce, dist.Work.wait) == before
    return words


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("plugins.ddp=null", "plugins.zero={stage: 3}"),
        ("plugins.ddp=null", "plugins.zero={stage: 2}"),
        ("plugins.recompute={mode: full}",),
    ],
    ids=["ddp", "zero3", "zero2", "recompute"],
)
def test_two_ranks_leave_traces_whose_parts_add_up(recipe, tmp_path, changes):
    out = tmp_path / "out"
    words = run_ranks(2, rank, recipe, changes, SETTINGS, out, timeout_s=100)
    document = json.loads((out / "profile.json").read_text())
    assert (out / "profile.txt").read_text() == words[0] and words[1] == ""
    assert [found["rank"] for found in document["ranks"]] == [0, 1]
    assert document["left_out"] == ["checkpoint", "console", "jsonl"]
    for number, found in enumerate(document["ranks"]):
        window = found["window_ms"]
        assert sum(found["phases_ms"].values()) == pytest.approx(window, rel=1e-6)
        assert sum(found["groups_ms"].values()) == pytest.approx(window, rel=1e-6)
        assert found["phases_ms"]["other"] < 0.5 * window
        assert found["groups_ms"]["matrix products"] > 0 < found["groups_ms"]["attention"]
        owners = found["communication"]["exposed_by_owner_ms"]
        assert any(name.startswith(("ddp/", "zero/")) for name in owners)
        assert 0 < found["communication"]["exposed_ms"] <= found["communication"]["under_way_ms"] < window
        assert found["communication"]["exposed_ms"] <= found["groups_ms"]["communication"]
        trace = read(out / f"trace_rank_{number}.json")
        forwards = [each for each in trace.host if each.name == "camshaft/phase/forward"]
        assert len(trace.windows) == 1 and len(forwards) == 2  # two microbatches
        modules = [each for each in trace.host if each.name == "camshaft/module/model.layers.1.mlp"]
        assert len(modules) == (4 if "recompute" in str(changes) else 2)
        assert all(above.name != each.name for each in modules for above in each.parent.chain())  # all were closed
        events = json.loads((out / f"trace_rank_{number}.json").read_text())["traceEvents"]
        drawn = [event["args"]["bytes"] for event in events if event["ph"] == "C"]
        assert max(drawn) == found["memory"]["peak_bytes"]
        check_memory(found["memory"], divided="plugins.ddp=null" in changes)
    assert document["mfu"]["mfu"] is None and "CPU" in document["mfu"]["reason"]
    assert "exposed" in words[0] and "largest owners" in words[0] and "MFU unknown" in words[0]


def check_memory(memory, divided):
    """Adam has two numbers for each fp32 parameter; divided states are half of that on two ranks."""
    layer = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 64 + 2 * 32
    parameters = 4 * (2 * 258 * 32 + 2 * layer + 32)
    kinds = memory["peak_by_category"]
    assert sum(kinds.values()) == memory["peak_bytes"] >= memory["before_bytes"]
    state = parameters if divided else 2 * parameters
    assert kinds["optimizer state"] == pytest.approx(state, rel=0.05)
    weights = kinds["parameter"] + kinds.get("master weight", 0)
    if not divided:
        assert weights == parameters and kinds["gradient"] == pytest.approx(parameters, rel=0.05)
    else:
        assert parameters / 2 <= weights <= 1.6 * parameters
    sizes = [each["bytes"] for each in memory["largest_owners"]]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) == 10
    assert max(size for _, size in memory["timeline"]) == memory["peak_bytes"] == max(memory["most_in_phase"].values())


def contents(folder):
    """Every file below a folder, by name and digest."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_real_run_is_neither_continued_nor_changed(recipe, tmp_path, capsys):
    assert run(["train", str(recipe), *ONE, "training.max_steps=2"]) == 0
    home = tmp_path / "runs" / "small"
    before, latest = contents(home), os.readlink(home / "latest")
    assert run(["profile", str(recipe), *ONE, "training.max_steps=2", "--warmup=0"]) == 0  # also past max_steps
    assert os.readlink(home / "latest") == latest
    (made,) = home.glob("profile-*")
    assert contents(home).items() >= before.items()
    assert not list((made / "checkpoints").iterdir()) and not (made / "metrics.jsonl").exists()
    assert json.loads((made / "status.json").read_text())["state"] == "finished"
    shown = capsys.readouterr().out
    assert "checkpoint, console, jsonl" in shown and str(made) in shown
    assert run(["train", str(recipe), *ONE, "training.max_steps=2"]) == 0  # a finished run: a new one, not the profile
    assert os.readlink(home / "latest") not in (latest, made.name)


def test_ranks_are_started_by_a_launcher_as_for_training(recipe, tmp_path):
    line = [sys.executable, "-m", "camshaft", "profile", str(recipe), "--out", "made", "--warmup", "1", "--steps", "2"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "made" / "profile.json").read_text())
    assert [found["windows"] for found in document["ranks"]] == [2, 2]
    assert document["settings"] == {"warmup": 1, "steps": 2}
    assert document["mfu"]["tokens_per_s"] == pytest.approx(8 * 32 / document["ranks"][0]["window_ms"] * 1e3)
    assert "made" in done.stdout and "largest owners at the peak" in done.stdout
    assert "profiler_start" not in done.stderr
    again = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert again.returncode == 2 and "--out made is not an empty folder" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["training.max_steps=null", "training.max_epochs=1", "--warmup=500"], "Lower --warmup or --steps"),
        (["--out=text.jsonl"], "not an empty folder"),
        (["training.maxsteps=1"], "max_steps"),
        (["--steps=0"], "--steps"),
        (["batch.micro_batch_size=auto"], "auto is found by `camshaft train`"),
    ],
)
def test_what_cannot_be_profiled_is_refused_with_status_2(recipe, capsys, arguments, message):
    assert run(["profile", str(recipe), *ONE, *arguments]) == 2
    assert message in capsys.readouterr().err


class Ranger(camshaft.Plugin):
    """Opens a range of its own in each forward."""

    @camshaft.hookimpl
    def around_forward(self, call):
        def forward(batch):
            with torch.profiler.record_function("ranger.forward"):
                return call(batch)

        return forward


def test_a_plugins_range_is_listed_and_modules_are_as_before(recipe, tmp_path):
    resolved, _ = command.lean(str(recipe), ONE, 1)
    with session(resolved, Environment(), RunDirectory(tmp_path / "out").create(), {"ranger": Ranger()}) as trainer:
        program = trainer.stepper.program
        hooks = [
            len(module._forward_hooks) + len(module._forward_pre_hooks) for module in trainer.state.model.modules()
        ]
        recording = Recorder(trainer, Quiet(), Quiet()).run(SETTINGS, tmp_path / "out" / "trace.json")
        assert [len(names) for names in recording.gradients] == [len(trainer.state.named_parameters())], "of one window"
        assert trainer.stepper.program is program
        after = [
            len(module._forward_hooks) + len(module._forward_pre_hooks) for module in trainer.state.model.modules()
        ]
        assert after == hooks
    found = [each for each in read(tmp_path / "out" / "trace.json").host if each.name == "ranger.forward"]
    assert len(found) == 4


def test_training_knows_nothing_of_it():
    """What is not profiled pays nothing: not even an import."""
    script = "import sys, camshaft.loop, camshaft.cli.train; print([name for name in sys.modules if 'profil' in name])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert [name for name in ast.literal_eval(done.stdout) if name.startswith("camshaft")] == []


class Stop(Quiet):
    """Was asked to stop."""

    requested = 1


def test_a_request_to_stop_ends_it_without_a_trace(recipe, tmp_path):
    resolved, _ = command.lean(str(recipe), ONE, 1)
    with pytest.raises(camshaft.errors.Interrupted, match="no profile was written"):
        profile(resolved, Environment(), RunDirectory(tmp_path / "out").create(), Quiet(), Stop(), SETTINGS)
    assert not (tmp_path / "out" / "profile.json").exists()


def test_only_plugins_without_a_part_in_training_are_left_out(recipe):
    resolved, left_out = command.lean(str(recipe), ["plugins.ledger={}", "plugins.lr_schedule={type: cosine}"], 2)
    assert left_out == ["checkpoint", "console", "jsonl", "ledger"]
    assert list(resolved.recipe.plugins) == ["ddp", "adamw", "clip", "lr_schedule"]
    assert load(str(recipe)).recipe.plugins.keys() >= {"checkpoint", "console"}


def test_compiled_modules_are_neither_traced_into_nor_compiled_again():
    counted = []

    def backend(graph, _):
        counted.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    modules = Modules(model)
    compiled = torch.compile(model, backend=backend)
    try:
        plain = compiled(torch.ones(2, 4))
        modules.on = True
        assert torch.equal(compiled(torch.ones(2, 4)), plain)
    finally:
        modules.remove()
        torch._dynamo.reset()
    assert len(counted) == 1
