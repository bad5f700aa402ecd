"""ddp and zero on two data ranks, times tensor or pipeline parallel, against one plain process."""

import pytest
from parallel_cases import EXACT, MODEL, STEPS, Frozen, reference, run

from camshaft.testing.compare import assert_within, compare

pytestmark = pytest.mark.broad

CASES = [
    *((row, axis) for row in ("ddp", "zero 1", "zero 2", "zero 3") for axis in ("tp + sp", "1f1b", "zbv")),
    ("zero 2 last", "interleaved_1f1b"),
    ("zero 3 last", "zb_h1"),
    ("zero 3 kept", "interleaved_1f1b"),
    ("zero 2", "tp"),
]


@pytest.mark.parametrize(("row", "axis"), CASES)
def test_two_by_two(make_recipe, row, axis):
    wanted = reference(make_recipe, STEPS, "axes", model=MODEL)
    accumulation = 6 if axis == "zbv" else 3
    assert_within(compare(run(make_recipe, row, axis, accumulation=accumulation), wanted), EXACT)


@pytest.mark.parametrize("row", ["ddp", "zero 2", "zero 3"])
def test_a_stage_of_which_nothing_trains(make_recipe, row):
    """Its ranks take part in the norm, and have an optimizer of nothing."""
    frozen = Frozen("embed_tokens", "layers.0.", "layers.1.")
    wanted = reference(make_recipe, STEPS, "frozen stage", frozen.freeze, model=MODEL)
    cut = {"pipeline": {"schedule": "1f1b", "split": {"layers": [2, 3]}}}
    assert_within(compare(run(make_recipe, row, "cut", observers={"frozen": frozen}, more=cut), wanted), EXACT)
