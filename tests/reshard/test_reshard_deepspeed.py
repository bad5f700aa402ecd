"""DeepSpeed's stages read what the other rows wrote, and the other way round: in fp32, the widest that they have."""

from __future__ import annotations

from typing import Any

import pytest
from reshard_cases import END, HALF, gap, unequal

from camshaft.testing.compare import assert_within

# Sums in another order. Measured: gradients 4.4e-7, weights 3.1e-7, optimizer 3.5e-7, norm and loss 1e-7.
FP32 = {"gradients": 1e-6, "weights": 1e-6, "optimizer": 1e-6, "norm": 1e-6, "loss": 1e-6, "lr": 1e-15}
PAIRS = [
    ("deepspeed0-2", "zero3-2"),
    ("deepspeed1-2", "plain"),
    ("deepspeed2-2", "ddp-2"),
    ("deepspeed3-2", "zero2-3"),
    ("plain", "deepspeed0-2"),
    ("zero1-2", "deepspeed2-2"),
    ("zero3-4", "deepspeed3-2"),
    ("ddp-2", "deepspeed1-2"),
    ("deepspeed2-2", "deepspeed3-2"),
]


@pytest.fixture(scope="module", autouse=True)
def loaded() -> Any:
    """DeepSpeed is imported once, before ranks are forked: it takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        from camshaft_deepspeed.runtime import load

        load()
        yield


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_deepspeed_and_the_other_rows(written: Any, continued: Any, before: str, after: str) -> None:
    undisturbed, _ = written("plain", scalar=False, compute="fp32")
    saved, checkpoint = written(before, scalar=False, compute="fp32")
    ran = continued(after, checkpoint, scalar=False, compute="fp32")
    middle = saved.records[HALF - 1]
    assert unequal(ran.loaded.weights, middle.weights) == []
    assert unequal(ran.loaded.optimizer, middle.optimizer) == []
    assert [record.step for record in ran.records] == list(range(HALF + 1, END + 1))
    assert_within(gap(ran.records, undisturbed.records), FP32)
