"""``camshaft train`` with a micro batch of auto, as a user runs it: trials in processes of their own."""

import json
import os
import subprocess
import sys

import pytest
import yaml

import small_folder

PLUGIN = """
import torch

import camshaft


class Plugin(camshaft.Plugin):
    class Options(camshaft.Options):
        rows: int
        rank: int

    @camshaft.hookimpl
    def plan(self):
        return camshaft.Plan()

    @camshaft.hookimpl
    def pre_forward(self, state, batch):
        if state.world.rank == self.options.rank and batch.tokens.shape[0] > self.options.rows:
            raise torch.OutOfMemoryError(f"tried to allocate {batch.tokens.shape[0]} rows")
"""


@pytest.fixture
def start(tmp_path):
    """Writes a recipe over a plugin that has no room for more than some rows on one rank, and runs commands on it."""
    site = tmp_path / "site"
    small_folder.install(site, "narrow", PLUGIN)

    def run(processes, rows, *overrides, **launch):
        text = small_folder.recipe(
            "auto",
            model={"hidden_size": 16, "intermediate_size": 32},
            data={"sequence_length": 16},
            batch={"micro_batch_size": "auto", "global_batch_size": 4 * processes},
            training={"max_steps": 2, "log_every": 1},
            launch={"launcher": "torchrun", "processes": processes, "device": "cpu", "threads_per_rank": 1, **launch},
            run={"dir": "run"},
            plugins={
                **({"ddp": {}} if processes > 1 else {}),
                "narrow": {"rows": rows, "rank": processes - 1},
                "adamw": {"lr": 1e-3},
                "checkpoint": {"every_steps": 2},
                "jsonl": {},
            },
        )
        small_folder.fill(tmp_path, text, name="auto")
        places = [str(site), os.environ.get("PYTHONPATH")]
        done = subprocess.run(
            [sys.executable, "-m", "camshaft", "train", "auto.yaml", *overrides],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places)), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=200,
        )
        return done, tmp_path / "run"

    return run


def found_in(folder):
    return json.loads((folder / "micro_batch.json").read_text())


def steps_in(folder):
    return [json.loads(line)["progress/global_step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_what_one_of_two_ranks_has_no_room_for_does_not_fit(start):
    done, folder = start(2, 2)
    assert done.returncode == 0, done.stdout + done.stderr
    found = found_in(folder)
    assert [(each["micro_batch_size"], each["fits"]) for each in found["trials"]] == [(4, False), (2, True)]
    assert "4 rows" in found["trials"][0]["why"] and found["trials"][1]["peak_bytes"] > 1 << 20
    assert (found["micro_batch_size"], found["planned"]) == (2, 4)
    trial = folder / "trials" / "micro_2"
    assert yaml.safe_load((trial / "resolved.yaml").read_text())["batch"]["global_batch_size"] == 8, "2 microbatches"
    peaks = [json.loads((trial / f"rank_{rank}.peak.json").read_text()) for rank in range(2)]
    assert found["trials"][1]["peak_bytes"] == max(peaks)
    resolved = (folder / "resolved.yaml").read_text()
    assert yaml.safe_load(resolved)["batch"] == {
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "gradient_accumulation_steps": None,
        "on_out_of_memory": "stop",
    }
    assert "found for auto in 2 trial(s)" in resolved and steps_in(folder) == [1, 2]
    assert not list((folder / "trials").rglob("metrics.jsonl")) and not list((folder / "trials").rglob("step_*"))


def test_one_process_tries_in_processes_of_their_own_and_a_run_that_goes_on_keeps_the_choice(start):
    asked = ("launch.memory_gib=2", "batch.micro_batch_size=auto")
    done, folder = start(1, 2, *asked)
    assert done.returncode == 0, done.stdout + done.stderr
    found = found_in(folder)
    assert [each["micro_batch_size"] for each in found["trials"]] == [4, 2]
    assert found["memory_bytes"] == 2 << 30 and steps_in(folder) == [1, 2]

    again, _ = start(1, 99, *asked, "training.max_steps=3")  # with room for more by now
    assert again.returncode == 0, again.stdout + again.stderr
    assert "trying" not in again.stdout and "micro batch  2, found for auto" in again.stdout
    assert found_in(folder) == found and steps_in(folder) == [1, 2, 3]


def test_a_size_that_fits_in_halves_alone_does_not_fit(start):
    """What may be halved later is not halved in trials, where any size would fit."""
    done, folder = start(1, 2, "launch.memory_gib=2", "batch.on_out_of_memory=halve")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(each["micro_batch_size"], each["fits"]) for each in found_in(folder)["trials"]] == [(4, False), (2, True)]
    assert yaml.safe_load((folder / "resolved.yaml").read_text())["batch"]["on_out_of_memory"] == "halve"


def test_memory_that_is_stated_counts_for_what_the_whole_process_holds(start):
    done, folder = start(1, 99, "launch.memory_gib=0.05", "batch.global_batch_size=1")
    assert done.returncode == 4, done.stdout + done.stderr
    assert "no micro batch fits into 0.05 GiB" in done.stderr and "launch.memory_gib is 0.05" in done.stderr
    assert not (folder / "micro_batch.json").exists()
