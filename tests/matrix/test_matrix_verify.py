"""``verify`` raises no alarm on what the parity matrix found right: a sample; CAMSHAFT_FULL_MATRIX=1: all of it."""

import pytest
from matrix_cases import CASES, FEW, FULL, Combination, everything, promised
from matrix_runs import recipe_of

from camshaft.verify.examine import verify


def alarms() -> list[Combination]:
    """One of each triple of data, tensor and pipeline: the precision is verify's own. DeepSpeed has no fp64."""
    triples = {
        (each.data, each.tensor, each.pipeline): each
        for each in (everything() if FULL else CASES)
        if promised(each) and (FULL or each.ranks <= FEW)
    }
    found = sorted(triples.values())
    return found if FULL else found[:: len(found) // 5]


@pytest.mark.parametrize("combination", alarms(), ids=str)
def test_no_alarm_on_what_is_right(make_recipe, combination):
    report = verify(recipe_of(make_recipe, combination))
    assert report.green, str(report.finding)
    assert report.comparison is not None and report.comparison.compared["gradients"] > 50
