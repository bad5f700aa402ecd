"""Saved under tensor parallel, pipelines and data ranks in each combination, loaded under each other, trained on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from grid_cases import FROZEN, FULL, LAYOUTS, WIDE, pairs
from reshard_cases import FP64, HALF, check_loaded, gap, unequal

import camshaft_checkpoint
from camshaft.testing.compare import assert_bit_equal, assert_within
from camshaft_checkpoint import tensorfile

MASTERS = {"compute": "bf16", "parameters": "bf16"}
FP32 = {"loss": 1e-6, "norm": 2e-6}


@pytest.mark.parametrize(("before", "after"), pairs())
def test_a_layout_goes_on_from_another(written_grid: Any, continued_grid: Any, before: str, after: str) -> None:
    undisturbed, _ = written_grid("plain", compute="fp64")
    saved, checkpoint = written_grid(before, compute="fp64")
    ran = continued_grid(after, checkpoint, compute="fp64")
    check_loaded(ran, saved)
    assert_within(gap(ran.records, undisturbed.records), FP64)


def test_the_sample_has_each_layout_on_both_sides() -> None:
    chosen = pairs()
    assert (
        {before for before, _ in chosen}
        == {after for _, after in chosen}
        == set(LAYOUTS) | (set(WIDE) if FULL else set())
    )
    assert all(before != after for before, after in chosen)


@pytest.mark.parametrize("row", ["pp2 dp2", "tp2 zero3", "tp2 pp2"])
def test_a_layout_goes_on_from_itself_in_every_bit(written_grid: Any, continued_grid: Any, row: str) -> None:
    saved, checkpoint = written_grid(row, compute="fp64")
    ran = continued_grid(row, checkpoint, compute="fp64")
    check_loaded(ran, saved)
    assert_bit_equal(ran.records, saved.records[HALF:])


def test_a_checkpoint_says_nothing_of_its_layout(written_grid: Any) -> None:
    """Names, dtypes, shapes and bytes are those of one process; what is copied is there once."""
    found = {}
    for name in LAYOUTS:
        _, checkpoint = written_grid(name, compute="fp64")
        tensors = camshaft_checkpoint.inspect(checkpoint)["tensors"]
        found[name] = {key: (each["dtype"], each["shape"], each["bytes"]) for key, each in tensors.items()}
        assert camshaft_checkpoint.verify(checkpoint) == []
        headers = [tensorfile.read_header(file) for file in checkpoint.glob("*.safetensors")]
        written = sum(entry.end - entry.begin for header in headers for entry in header.values())
        assert written == sum(size for _, _, size in found[name].values()), name
    assert all(each == found["plain"] for each in found.values())
    assert not any(key.startswith("optimizer.") and FROZEN in key for key in found["plain"])
    assert "model.lm_head.weight" not in found["plain"]  # tied; the last stage's copy is no parameter


@pytest.mark.parametrize(
    ("optimizer", "before", "after"), [("sgd", "tp2+sp", "pp2 zero3"), ("lion", "pp2", "tp2 zero2")]
)
def test_state_of_other_optimizers(
    written_grid: Any, continued_grid: Any, optimizer: str, before: str, after: str
) -> None:
    undisturbed, _ = written_grid("plain", optimizer=optimizer, compute="fp64")
    saved, checkpoint = written_grid(before, optimizer=optimizer, compute="fp64")
    ran = continued_grid(after, checkpoint, optimizer=optimizer, compute="fp64")
    check_loaded(ran, saved)
    assert_within(gap(ran.records, undisturbed.records), FP64)


@pytest.mark.parametrize(("before", "after"), [("tp2 zero3", "pp2"), ("pp2 dp2", "tp2+sp"), ("tp2", "pp2 zero3")])
def test_masters_of_divided_parameters(written_grid: Any, continued_grid: Any, before: str, after: str) -> None:
    saved, checkpoint = written_grid(before, **MASTERS)
    ran = continued_grid(after, checkpoint, **MASTERS)
    check_loaded(ran, saved)
    weights = ran.loaded.weights
    assert {weights[name].dtype for name in weights if FROZEN not in name} == {torch.float32}
    for name, parameter in ran.loaded.parameters.items():
        box = ran.loaded.boxes.get(name)
        whole = weights[name].bfloat16()
        own = whole if box is None else whole[box]
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, own), f"{name} does not follow its master"
    assert not any("rounded" in line for line in ran.told)


@pytest.mark.parametrize(("before", "after"), [("tp2 zero1", "pp2 dp2"), ("pp2", "tp4")])
def test_numbers_in_fp32_stay_close(written_grid: Any, continued_grid: Any, before: str, after: str) -> None:
    saved, checkpoint = written_grid(before, compute="fp32")
    ran = continued_grid(after, checkpoint, compute="fp32")
    assert unequal(ran.loaded.weights, saved.records[HALF - 1].weights) == []
    assert_within(gap(ran.records, saved.records), FP32)
