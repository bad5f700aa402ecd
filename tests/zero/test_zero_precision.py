"""Every row in bf16: by autocast over fp32, and with bf16 parameters and fp32 masters, against a plain loop."""

import pytest
import torch
from zero_cases import assert_parity, global_batch, reference, train

from camshaft.testing.compare import assert_within, compare

pytestmark = pytest.mark.broad

AUTOCAST, NARROW = {"compute": "bf16"}, {"compute": "bf16", "parameters": "bf16"}
WIDE_SUMS = {**NARROW, "gradients": "fp32"}


def wanted(make_recipe, precision, total=12, **case):
    return reference(make_recipe, total, compute="bf16", parameters=precision.get("parameters"), **case)


@pytest.mark.parametrize(
    ("row", "ranks", "accumulation", "precision", "variant"),
    [
        ("1", 2, 4, AUTOCAST, "picky"),
        ("hybrid 2", 4, 1, AUTOCAST, "plain"),
        ("replicate", 2, 4, NARROW, "frozen"),
        ("1", 2, 4, NARROW, "picky"),
        ("2", 3, 4, NARROW, "tied frozen, unused"),
        ("3", 2, 4, NARROW, "frozen"),
        ("3", 3, 1, WIDE_SUMS, "picky"),
        ("3 last", 2, 4, {**WIDE_SUMS, "reduce": "bf16"}, "plain"),
        ("hybrid 3", 4, 1, NARROW, "picky"),
    ],
)
def test_stays_within_the_stated_bound(make_recipe, row, ranks, accumulation, precision, variant):
    steps = 20 if ranks < 3 else 6
    case = {"variant": variant, "steps": steps, "optimizer": "adamw" if precision is AUTOCAST else "slow adamw"}
    records = train(make_recipe, row, ranks, accumulation, compute=precision, **case)[0]
    total = global_batch(ranks, accumulation)
    assert_parity(records, wanted(make_recipe, precision, total, **case), "bf16")
    wide = [*records[-1].optimizer.values(), *(g for g in records[-1].gradients.values() if g is not None)]
    assert {tensor.dtype for tensor in wide} == {torch.float32}, "masters, their gradients and moments are fp32"
    moved = {name for name in records[0].gradients if f"{name}/exp_avg" in records[-1].optimizer}
    assert {records[-1].weights[name].dtype for name in moved} == {torch.float32}


@pytest.mark.parametrize("precision", [NARROW, WIDE_SUMS], ids=["bf16 sums", "fp32 sums"])
def test_stages_are_equal_to_each_other(make_recipe, precision):
    """Rounded in the same places; only optimizers' kernels round otherwise in the last elements of a tensor."""
    case = {"compute": precision, "variant": "picky", "steps": 5}
    runs = [train(make_recipe, row, 2, 4, **case)[0] for row in ("1", "3 last", "replicate")]
    for records in runs[1:]:
        first = [records[0].gradients, runs[0][0].gradients]
        assert all(torch.equal(first[0][name], first[1][name]) for name in first[0])
        assert_within(compare(records, runs[0]), {"loss": 1e-6, "norm": 1e-5, "weights": 1e-4, "optimizer": 1e-3})


def test_gradients_in_fp32_are_added_up_in_fp32(make_recipe):
    """Over 6 microbatches: nearer to one backward of the whole window than sums that are rounded after each."""
    exact = train(make_recipe, "1", 2, 1, compute=WIDE_SUMS, steps=5)[0][0].gradients

    def error(row, precision):
        found = train(make_recipe, row, 2, 6, compute=precision, steps=5)[0][0].gradients
        return sum(float((found[name] - exact[name]).norm() / exact[name].norm()) for name in exact)

    wide = [error(row, WIDE_SUMS) for row in ("1", "2", "3 last")]
    assert max(wide) < 0.8 * error("1", NARROW), wide
