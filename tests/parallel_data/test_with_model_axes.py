"""ddp and zero on two data ranks, times tensor or pipeline parallel, against one plain process."""

import pytest
from parallel_cases import EXACT, MODEL, STEPS, reference, run

from camshaft.testing.compare import assert_within, compare

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
