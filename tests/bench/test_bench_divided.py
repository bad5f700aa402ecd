"""Benchmarks of what divides the model: each runs a block, and its contestants do the same work."""

import math

import pytest

from tools.bench import __main__ as command
from tools.bench import pipeline, pipeline_sleep, sharded, single_gpu, tensor
from tools.bench.setup import Case
from tools.bench.sharded import LOSS_GAP
from tools.bench.sleeping import Naps


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("KINETO_LOG_LEVEL", "9")


def assert_same_work(found, contestants):
    rows = {row["contestant"]: row for row in found["rows"]}
    assert rows.keys() == set(contestants)
    losses = [row["first_loss"] for row in rows.values()]
    assert max(losses) - min(losses) <= LOSS_GAP["fp32"] * max(losses) and min(losses) > 0
    assert all(row["step_ms"] > 0 and row["tensors_mb"] > 0 and row["tokens_per_s"] > 0 for row in rows.values())
    for target in found["targets"]:
        ours, peer = rows[target["ours"]], rows[target["peer"]]
        assert math.isclose(target["speed"], ours["tokens_per_s"] / peer["tokens_per_s"])


@pytest.fixture
def without_peaks(monkeypatch):
    """Peaks of memory are measured under torch's profiler, in ranks of their own, which takes most of the time."""
    monkeypatch.setattr(sharded, "tensor_peaks", lambda case, entries, world_size: dict.fromkeys(entries, 1.0))


NANO = {"preset": "llama-nano", "tie_word_embeddings": False}


def test_tensor_parallel_beside_parallelize_module(without_peaks):
    case = Case("small", NANO, 32, 2, 1, "fp32", steps=1, blocks=1)
    found = sharded.measure(case, tensor.ENTRIES, 2, 1, tensor.TARGETS)
    assert_same_work(found, tensor.ENTRIES)
    assert len(found["targets"]) == 3
    assert "| small | tensor | parallelize_module |" in "\n".join(command.race_tables("t", found))


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_pipelines_beside_torchs(monkeypatch, without_peaks, schedule):
    monkeypatch.setattr(pipeline, "MODEL", pipeline.MODEL | NANO)
    monkeypatch.setattr(pipeline, "MICROBATCHES", 4)
    found = pipeline.run(1, [f"{schedule}-2"])
    assert_same_work(found, pipeline.CONTESTANTS)
    assert [target["case"] for target in found["targets"]] == [f"{schedule}-2"]


def test_peaks_of_a_pipeline_are_of_its_own_stages():
    """A rank holds half of the model, its gradients and two moments, and not much more."""
    case = Case("peaks", NANO | {"num_hidden_layers": 2, "hidden_size": 128}, 8, 1, 2, "fp32", steps=1, blocks=1)
    entry = pipeline.entries_of("1f1b", 2)[pipeline.OURS]
    ours = sharded.tensor_peaks(case, {pipeline.OURS: entry}, 2)[pipeline.OURS]
    largest = 4 * 4 * (1024 * 128 + 128 * 128 * 4 + 128 * 192 * 3) / 2**20
    assert 0.75 * largest < ours < 1.5 * largest, "MiB of parameters, gradients and two moments of a stage"


@pytest.mark.parametrize("schedule", ["gpipe", "zbv", "zb_h1"])
def test_sleeping_stages_of_both_engines_sleep_as_often(monkeypatch, schedule):
    """The contestants themselves compare how often each part of a stage slept, and the losses, and raise."""
    monkeypatch.setattr(pipeline_sleep, "SECONDS", 0.002)
    row = pipeline_sleep.race(schedule, 2, 4, 1, steps=1)
    assert row["ours"] >= 0.99 and row["torch"] >= 0.99, "nothing is faster than the simulation"
    assert row["met"] is (row["ours"] <= 1.05 and row["ours"] < row["torch"])
    assert f"| {schedule} | 2 | 4 |" in "\n".join(command.sleep_table([row]))


def test_a_part_that_did_not_sleep_is_seen():
    naps = Naps(0.0, forwards=4, inputs=4, weights=0)
    with pytest.raises(AssertionError, match=r"slept \(4, 4, 0\) times, not 4"):
        naps.check(4)


def test_unknown_names_of_contestants_are_refused():
    with pytest.raises(SystemExit, match="no contestant"):
        command.check_contestants(["Camshaft", "torhc"])
    command.check_contestants(["Camshaft", "torch", "DDP", "tensor"])


def test_one_device_beside_plain_pytorch(monkeypatch):
    """Without a GPU it runs a tiny model; nothing is compiled here, and both have the same losses."""
    monkeypatch.setattr(single_gpu, "FASTEST", {})
    names = [single_gpu.OURS, single_gpu.EAGER]
    kept = []
    found = single_gpu.run(1, names, kept.append)
    assert [len(each["rows"]) for each in kept] == [1, 2] and kept[-1] == found
    ours, plain = found["rows"]
    assert [ours["contestant"], plain["contestant"]] == names
    assert abs(ours["loss"] / plain["loss"] - 1) < 2e-3, "not the same work"
    assert [target["what"] for target in found["targets"]] == ["speed over PyTorch's best"]
    assert "| tiny | PyTorch |" in "\n".join(single_gpu.table(found))
