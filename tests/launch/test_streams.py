"""A run goes on when nobody can read what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launch_support import clean_environment

CAMSHAFT = [sys.executable, "-m", "camshaft"]
RECIPE = """
schema_version: 1
name: unheard
model: {vocab_size: 258, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2,
        num_key_value_heads: 1, max_position_embeddings: 64}
tokenizer: {type: byte}
data: {train: {files: [text.txt]}, validation_fraction: 0, sequence_length: 32, cache_dir: cache}
batch: {micro_batch_size: 2, global_batch_size: 4}
training: {max_steps: 6, log_every: 1}
launch: {processes: 2, device: cpu, threads_per_rank: 1}
plugins: {ddp: {}, adamw: {lr: 1.0e-3}, checkpoint: {every_steps: 2}, console: {}, jsonl: {}}
"""
ONE = ["launch.processes=1", "plugins.ddp=null"]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("words without an end " * 400)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "recipe.yaml"


def unread() -> int:
    """The writing end of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def full() -> int:
    """A file on a disk without room."""
    return os.open("/dev/full", os.O_WRONLY)


def finished(directory: Path) -> bool:
    """Whether the run did all it had to: status, records, and a checkpoint of the last step."""
    status = json.loads((directory / "status.json").read_text())
    steps = [
        json.loads(line)["progress/global_step"] for line in (directory / "metrics.jsonl").read_text().splitlines()
    ]
    last = (directory / "checkpoints" / "step_00000006" / "manifest.json").is_file()
    return (status["state"], status["exit_status"]) == ("finished", 0) and steps == [1, 2, 3, 4, 5, 6] and last


@pytest.mark.parametrize(("lost", "overrides"), [(unread, ONE), (full, ONE), (unread, [])])
def test_a_run_ends_well_when_neither_stream_can_be_written(recipe, tmp_path, lost, overrides):
    stream = lost()
    done = subprocess.run(
        [*CAMSHAFT, "train", str(recipe), "run.dir=run", *overrides],
        env=clean_environment(),
        stdin=subprocess.DEVNULL,
        stdout=stream,
        stderr=stream,
        timeout=90,
    )
    os.close(stream)
    assert done.returncode == 0 and finished(tmp_path / "run")


def test_a_run_that_starts_with_closed_streams_keeps_its_files_apart(recipe, tmp_path):
    words = " ".join(["exec", *CAMSHAFT, "train", "recipe.yaml", "run.dir=run", "<&- >&- 2>&-"])
    done = subprocess.run(["/bin/sh", "-c", words], env=clean_environment(), timeout=90)
    assert done.returncode == 0 and finished(tmp_path / "run")


def test_other_commands_say_that_standard_output_is_full(recipe):
    with open("/dev/full", "w") as stream:
        done = subprocess.run([*CAMSHAFT, "explain", str(recipe)], stdout=stream, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 3
    assert done.stderr == "error: standard output cannot be written: No space left on device\n"


def test_what_an_encoding_lacks_is_escaped(recipe, tmp_path):
    done = subprocess.run(
        [*CAMSHAFT, "train", str(recipe), "run.dir=rün", *ONE],
        env=clean_environment(PYTHONIOENCODING="ascii"),
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    assert "run directory r\\xfcn\n" in done.stdout and finished(tmp_path / "rün")
