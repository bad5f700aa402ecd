"""The ledger follows groups of several axes, and messages between stages, which differ from rank to rank."""

import json

import pytest
from parallel_cases import EXACT, MODEL, STEPS, reference, run

from camshaft.testing.compare import assert_within, compare


@pytest.mark.parametrize(("row", "axis"), [("zero 1", "tp + sp"), ("zero 2", "zbv"), ("ddp", "interleaved_1f1b")])
def test_ranks_of_all_axes_make_calls_that_agree(make_recipe, tmp_path, row, axis):
    ledger = {"compare_every": 1}
    accumulation = 6 if axis == "zbv" else 3
    records = run(make_recipe, row, axis, accumulation=accumulation, more={"ledger": ledger})
    assert_within(compare(records, reference(make_recipe, STEPS, "axes", model=MODEL)), EXACT)
    found = json.loads(next(tmp_path.rglob("ledger.json")).read_text())
    calls = {(each["plugin"], each["axis"], each["op"]) for each in found["rows"]}
    joined = "dp+tp" if axis.startswith("tp") else "pp" if row == "ddp" else "pp+dp"
    assert ("core", joined, "all_reduce") in calls, "the norm is one sum over all ranks of a copy of the model"
    assert (("pipeline", "pp", "send") in calls) == (not axis.startswith("tp"))
