"""``camshaft train`` from end to end on a small model: launchers, interruptions, run directories, exit statuses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch_support import VENV, clean_environment, started, until

from camshaft.cli import run
from camshaft.processes import alive
from camshaft.rundir import RunDirectory

RECIPE = """
schema_version: 1
name: small
model: {vocab_size: 258, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2,
        num_key_value_heads: 1, max_position_embeddings: 64}
tokenizer: {type: byte}
data: {train: {files: [text.jsonl]}, validation_fraction: 0, sequence_length: 32, cache_dir: cache}
batch: {micro_batch_size: 1, global_batch_size: 4}
training: {max_steps: 60, log_every: 1}
launch: {processes: 2, device: cpu, threads_per_rank: 1}
plugins:
  ddp: {}
  adamw: {lr: 1.0e-3}
  clip: {max_norm: 0.5}
  checkpoint: {every_steps: 10, keep_last: 2}
  console: {}
  jsonl: {}
"""
ONE = ["launch.processes=1", "plugins.ddp=null"]
CAMSHAFT = [sys.executable, "-m", "camshaft"]


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    lines = [json.dumps({"text": f"document {number}: " + "lorem ipsum " * (number % 7 + 1)}) for number in range(120)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    (tmp_path / "small.yaml").write_text(RECIPE)
    return tmp_path / "small.yaml"


def losses(directory):
    """Step to loss, from every record of every start; a step that was done twice must agree with itself."""
    found = {}
    for line in (directory / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "train/loss" in record:
            loss = found.setdefault(record["progress/global_step"], record["train/loss"])
            assert loss == record["train/loss"]
    return found


def slurm(recipe, directory):
    """The same recipe as two Slurm tasks: processes that nobody but the environment tells what they are."""
    tasks = []
    for rank in range(2):
        names = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NTASKS": 2, "SLURM_NNODES": 1, "SLURM_JOB_ID": 1}
        environ = clean_environment(**{name: str(value) for name, value in names.items()}, SLURM_STEP_ID="0")
        line = [*CAMSHAFT, "train", str(recipe), f"run.dir={directory}"]
        tasks.append(subprocess.Popen(line, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
    for task in tasks:
        _, errors = task.communicate(timeout=90)
        assert task.returncode == 0, errors.decode()
    return losses(directory)


def test_stopped_killed_and_continued_by_the_same_command_is_bit_equal_to_slurm_undisturbed(recipe, tmp_path):
    """deepspeed under the front: SIGTERM, then SIGKILL of the front, then to the end."""
    line = [*CAMSHAFT, "train", str(recipe)]
    latest = tmp_path / "runs" / "small" / "latest"
    with started(line, tmp_path / "out1") as process:
        until(lambda: (latest / "heartbeat").exists(), 60)
        process.steps(latest, 2, 5)
        assert "libtorch" not in Path(f"/proc/{process.popen.pid}/maps").read_text(), "the front needs no torch"
        began = time.monotonic()
        process.popen.send_signal(signal.SIGTERM)
        assert process.wait(25) == 130, process.text()
        assert time.monotonic() - began < 25
    assert "a checkpoint was written" in process.text()
    assert f"deepspeed --num_gpus 2 --no_local_rank --module camshaft train {recipe}" in process.text()
    status = RunDirectory(latest).read_status()
    assert (status["state"], status["exit_status"], status["world_size"]) == ("interrupted", 130, 2)
    stopped_at = status["step"]
    assert 5 <= stopped_at < 60

    with started(line, tmp_path / "out2") as process:
        until(lambda: "continuing" in process.text(), 30)
        beats = process.steps(latest, 2, min(stopped_at + 3, 59))
        process.popen.kill()
        until(lambda: not any(alive(beat.process) for beat in beats), 4)
        until(lambda: not process.left(), 10)
    assert RunDirectory(latest).read_status()["state"] == "running"

    with started(line, tmp_path / "out3") as process:
        assert process.wait(90) == 0, process.text()
        process.note(latest)
    assert "(running)" in process.text() and "--fresh" in process.text()
    status = RunDirectory(latest).read_status()
    assert (status["state"], status["exit_status"], status["step"]) == ("finished", 0, 60)
    assert len(list((tmp_path / "runs" / "small").iterdir())) == 2, "one run and the link to it"
    for name in ("recipe.yaml", "resolved.yaml", "env.json"):
        assert (latest / name).exists()
    found = losses(latest)
    assert sorted(found) == list(range(1, 61))
    assert found == slurm(recipe, tmp_path / "undisturbed")


def test_one_rank_under_torchrun_is_bit_equal_to_one_process(recipe, tmp_path, capsys):
    steps = "training.max_steps=6"
    assert run(["train", str(recipe), *ONE, steps, "run.dir=plain"]) == 0
    assert "step=6/6" in capsys.readouterr().out
    line = [str(VENV / "torchrun"), "--nproc-per-node", "1", "-m", "camshaft"]
    with started([*line, "train", str(recipe), *ONE, steps, "run.dir=torchrun"], tmp_path / "out") as process:
        assert process.wait(60) == 0, process.text()
    assert losses(tmp_path / "plain") == losses(tmp_path / "torchrun")
    assert json.loads((tmp_path / "torchrun" / "env.json").read_text())["launcher"] == "torchrun"


def test_faults_of_a_recipe_end_before_anything_is_started_or_made(recipe, tmp_path, capsys):
    assert run(["train", str(recipe), "batch.global_batch_size=5", "plugins.clip.max_norn=1"]) == 2
    text = capsys.readouterr().err
    assert "max_norn" in text
    assert run(["train", str(recipe), "plugins.ddp=null"]) == 2
    assert "parallel.data_parallel" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_run_directory_in_use_is_refused(recipe, tmp_path, capsys):
    lock = RunDirectory(tmp_path / "busy").create().lock()
    for processes in (ONE, []):
        assert run(["train", str(recipe), *processes, "run.dir=busy"]) == 3
        assert f"in use by process {os.getpid()}" in capsys.readouterr().err
    lock.release()


def test_contradicting_environment_is_status_3(recipe, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(["train", str(recipe)]) == 3
    assert "RANK, LOCAL_RANK" in capsys.readouterr().err


def test_more_gpus_than_there_are_is_status_3(recipe, capsys, monkeypatch):
    monkeypatch.setattr("camshaft.cli.train._count_gpus", lambda *, asked: int(asked))
    assert run(["train", str(recipe), "launch.device=cuda"]) == 3
    assert "this machine shows 1" in capsys.readouterr().err


def handlers():
    return [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)]


def test_one_process_continues_and_starts_afresh(recipe, tmp_path, capsys):
    home = tmp_path / "runs" / "small"
    line = ["train", str(recipe), *ONE, "training.max_steps=3"]
    before = handlers()
    assert run(line) == 0
    first = (home / "latest").resolve()
    assert RunDirectory(first).read_status()["state"] == "finished"
    assert json.loads((first / "logs" / "rank_0.exit.json").read_text())["status"] == 0
    RunDirectory(first).write_status(state="failed")
    capsys.readouterr()
    assert run(line) == 0
    assert "continuing" in capsys.readouterr().out and (home / "latest").resolve() == first
    RunDirectory(first).write_status(state="failed")
    assert run([*line, "--fresh"]) == 0
    assert (home / "latest").resolve() != first
    assert handlers() == before


def test_one_process_stops_on_ctrl_c_after_a_checkpoint(recipe, tmp_path):
    line = [*CAMSHAFT, "train", str(recipe), *ONE, "training.max_steps=100000", "run.dir=one"]
    with started(line, tmp_path / "out") as process:
        process.steps(tmp_path / "one", 1, 3)
        process.popen.send_signal(signal.SIGINT)
        assert process.wait(25) == 130, process.text()
    status = RunDirectory(tmp_path / "one").read_status()
    assert status["state"] == "interrupted" and (tmp_path / "one" / "checkpoints" / "latest").exists()
    assert "a checkpoint was written" in process.text() and "Traceback" not in process.text()


def test_a_run_that_is_continued_with_another_recipe_says_what_changed(recipe, tmp_path, capsys):
    line = ["train", str(recipe), *ONE, "run.dir=mine"]
    assert run([*line, "training.max_steps=2"]) == 0
    assert "changed since" not in capsys.readouterr().out
    changes = ["training.max_steps=4", "plugins.adamw.lr=9e-3", "plugins.clip=null", "run.root=elsewhere"]
    assert run([*line, *changes]) == 0
    text = capsys.readouterr().out
    said = [found for found in text.splitlines() if "changed since" in found]
    assert said[0] == "changed since the run began: training.max_steps 2 -> 4"
    assert said[1] == "changed since the run began: plugins.adamw.lr 0.001 -> 0.009"
    assert said[2].startswith("changed since the run began: plugins.clip {max_norm: 0.5") and len(said) == 3
    assert said[2].endswith("} -> (not set)")
    assert text.index("continuing the run in mine") < text.index(said[0])


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_one_process_without_memory_for_its_imports_is_one_line_and_status_4(recipe, monkeypatch, capsys, error):
    def no_room(*_: object) -> None:
        raise error

    monkeypatch.setattr("camshaft.distributed.set_threads", no_room)
    assert run(["train", str(recipe), *ONE]) == 4
    text = capsys.readouterr().err
    assert text.startswith("error: memory ran out") and text.count("\n") == 1 and "ulimit -v" in text
