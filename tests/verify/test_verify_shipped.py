"""``verify`` on shipped recipes: green, within two minutes. By default some; all with CAMSHAFT_ALL_FAULTS=1."""

import os
from pathlib import Path

import pytest

from camshaft.recipe import load
from camshaft.verify.examine import verify

SHIPPED = Path(__file__).parents[2] / "recipes"
NAMES = sorted(path.name for path in SHIPPED.glob("*.yaml"))
SOME = ("quickstart.yaml", "deepspeed_zero.yaml", "muon.yaml", "tensor_parallel.yaml")
CHOSEN = NAMES if os.environ.get("CAMSHAFT_ALL_FAULTS") else SOME


@pytest.mark.parametrize("name", CHOSEN)
def test_a_shipped_recipe_proves_itself(name, record_property):
    report = verify(load(SHIPPED / name))
    record_property("seconds", round(report.seconds, 1))
    assert report.green, f"{report.finding}"
    assert report.comparison.compared["gradients"] >= 4 * 20 and report.comparison.compared["optimizer"] > 0
    assert report.seconds < 120
