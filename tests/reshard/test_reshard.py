"""Saved under each row of the family, loaded under each other on another number of ranks, and trained on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reshard_cases import FP64, HALF, check_loaded, gap, unequal

from camshaft.testing.compare import assert_bit_equal, assert_within

pytestmark = pytest.mark.broad

ROWS = ("plain", "ddp-2", "zero1-2", "zero2-3", "zero3-2", "zero3-4", "hybrid-2x2")
MASTERS = {"compute": "bf16", "parameters": "bf16"}


def pairs(*distances: int) -> list[tuple[str, str]]:
    """(written by, read by): each row with those so many places further on."""
    return [(row, ROWS[(place + far) % len(ROWS)]) for far in distances for place, row in enumerate(ROWS)]


@pytest.mark.parametrize(("before", "after"), pairs(1, 2, 4))  # half of all, for time
def test_a_row_goes_on_from_another(written: Any, continued: Any, before: str, after: str) -> None:
    undisturbed, _ = written("plain", compute="fp64")
    saved, checkpoint = written(before, compute="fp64")
    ran = continued(after, checkpoint, compute="fp64")
    check_loaded(ran, saved)
    assert_within(gap(ran.records, undisturbed.records), FP64)


@pytest.mark.parametrize("row", ["ddp-2", "zero2-3", "hybrid-2x2"])
def test_a_row_goes_on_from_itself_in_every_bit(written: Any, continued: Any, row: str) -> None:
    saved, checkpoint = written(row, compute="fp64")
    ran = continued(row, checkpoint, compute="fp64")
    check_loaded(ran, saved)
    assert_bit_equal(ran.records, saved.records[HALF:])


def test_the_model_has_what_makes_layouts_hard(written: Any) -> None:
    ran, _ = written("zero3-2", compute="fp64")
    state = ran.records[HALF - 1].optimizer
    assert (state["gate/step"], state["late/step"], state["model.norm.weight/step"]) == (1, 1, 3)
    assert not any(name.startswith(("unused/", "model.layers.1.")) for name in state)
    assert "unused" in ran.records[-1].weights
    late = [record.weights["late"] for record in ran.records]
    assert torch.equal(late[0], late[1])  # no gradient yet
    assert not torch.equal(late[4], late[5])


@pytest.mark.parametrize(("before", "after"), pairs(3))
def test_momentum_is_carried_over(written: Any, continued: Any, before: str, after: str) -> None:
    saved, checkpoint = written(before, optimizer="sgd", compute="fp64")
    ran = continued(after, checkpoint, optimizer="sgd", compute="fp64")
    check_loaded(ran, saved)
    assert_within(gap(ran.records, saved.records), FP64)


@pytest.mark.parametrize("optimizer", ["lion", "lamb", "muon"])
def test_state_of_other_optimizers_is_carried_over(written: Any, continued: Any, optimizer: str) -> None:
    saved, checkpoint = written("zero3-2", optimizer=optimizer, compute="fp64")
    ran = continued("ddp-2", checkpoint, optimizer=optimizer, compute="fp64")
    check_loaded(ran, saved)
    assert_within(gap(ran.records, saved.records), FP64)


@pytest.mark.parametrize("other", ["plain", "zero3-4"])
def test_dtensors_of_fully_shard(written: Any, continued: Any, other: str) -> None:
    for before, after in ((other, "torch-2"), ("torch-2", other)):
        saved, checkpoint = written(before, scalar=False, compute="fp64")
        ran = continued(after, checkpoint, scalar=False, compute="fp64")
        check_loaded(ran, saved)
        assert_within(gap(ran.records, saved.records), FP64)


@pytest.mark.parametrize(
    ("before", "after"),
    [("zero3-2", "ddp-2"), ("ddp-2", "zero2-3"), ("zero2-3", "plain"), ("zero3-2", "zero3-2")],
)
def test_masters_of_narrow_parameters(written: Any, continued: Any, before: str, after: str) -> None:
    saved, checkpoint = written(before, **MASTERS)
    ran = continued(after, checkpoint, **MASTERS)
    check_loaded(ran, saved)
    assert ran.loaded.weights["late"].dtype == torch.float32
    for name, parameter in ran.loaded.parameters.items():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, ran.loaded.weights[name].bfloat16()), f"{name} does not follow its master"
    if before == after:
        assert_bit_equal(ran.records, saved.records[HALF:])
    assert not any("rounded" in line for line in ran.told)


@pytest.mark.parametrize(("before", "after"), [("zero1-2", "ddp-2"), ("plain", "zero3-2")])
def test_precision_may_change(written: Any, continued: Any, before: str, after: str) -> None:
    wide, checkpoint = written(before, compute="fp32")
    ran = continued(after, checkpoint, **MASTERS)
    state, weights = wide.records[HALF - 1].optimizer, wide.records[HALF - 1].weights
    frozen = {name for name in weights if "layers.1." in name}
    assert unequal(ran.loaded.optimizer, state) == []  # moments are those of the fp32 masters
    assert unequal(ran.loaded.weights, weights | {name: weights[name].bfloat16() for name in frozen}) == []
    assert [line for line in ran.told if f"{len(frozen)} tensor(s) in torch.float32, which were rounded" in line]

    narrow, checkpoint = written(after, **MASTERS)
    ran = continued(before, checkpoint, compute="fp32")
    weights = narrow.records[HALF - 1].weights
    assert unequal(ran.loaded.weights, {name: value.float() for name, value in weights.items()}) == []
    assert unequal(ran.loaded.optimizer, narrow.records[HALF - 1].optimizer) == []
    assert not any("rounded" in line for line in ran.told)
