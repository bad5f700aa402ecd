"""Mutation test of ``verify``: every planted fault makes it red, and it names the plugin and the tensor or number.

By default a few; with CAMSHAFT_ALL_FAULTS=1 all, and the share that is caught is told.
"""

import os
import re
import time

import pytest
from verify_faults import FAULTS, QUICK, planted
from verify_recipes import RECIPES, recipe

from camshaft.verify.examine import verify

ALL = bool(os.environ.get("CAMSHAFT_ALL_FAULTS"))
TENSOR_OR_NUMBER = re.compile(r"'?model\.\w|\b(norm|coefficient|lr|loss)\b")
CHOSEN = FAULTS if ALL else [fault for fault in FAULTS if str(fault) in QUICK]


def test_the_catalogue_is_large_and_about_every_kind_of_plugin():
    assert len(FAULTS) >= 30 and len({str(fault) + fault.recipe for fault in FAULTS}) == len(FAULTS)
    assert {fault.recipe for fault in FAULTS} == set(RECIPES)
    assert len(CHOSEN) == (len(FAULTS) if ALL else len(QUICK))


@pytest.mark.parametrize("fault", CHOSEN, ids=lambda fault: f"{fault} ({fault.recipe})")
def test_a_planted_fault_is_found_and_its_plugin_named(tmp_path, fault, record_property):
    resolved = recipe(tmp_path, fault.recipe)
    began = time.monotonic()
    with planted(fault):
        report = verify(resolved)
    record_property("seconds", round(time.monotonic() - began, 1))
    assert not report.green, "nothing was found"
    assert fault.plugin in report.finding.plugins, f"{report.finding}"
    assert fault.sign in str(report.finding.sign), f"{report.finding}"
    assert TENSOR_OR_NUMBER.search(str(report.finding.sign)), f"no tensor is named: {report.finding}"
    assert len(report.finding.plugins) <= 2, f"too many are blamed: {report.finding}"


@pytest.mark.parametrize("name", sorted(RECIPES) if ALL else ["zbv", "hybrid"])
def test_without_a_fault_all_is_well(tmp_path, name):
    report = verify(recipe(tmp_path, name))
    assert report.green, f"{report.finding}"
    assert all(count > 0 for count in report.comparison.compared.values()), report.comparison.compared
    clipped = report.comparison.worst["coefficient"]
    assert clipped.value <= clipped.bound
