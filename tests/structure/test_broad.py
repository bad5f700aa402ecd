"""Families that are tried in part are tried with every value."""

from itertools import product

import pytest

from broad import COMPLETE, covering

pytest_plugins = ("pytester",)

FAMILY = """
import pytest

@pytest.mark.parametrize("row", range(4))
@pytest.mark.parametrize("ranks", [1, 2])
{marker}
def test_family(row, ranks):
    assert row < 4

def test_alone():
    pass
"""


@pytest.mark.parametrize("sizes", [(2, 2), (4, 2), (3, 5), (2, 3, 4), (7,), (1, 1)])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_every_value_occurs(sizes, share):
    cases = [set(enumerate(values)) for values in product(*map(range, sizes))]
    kept = covering(cases, share)
    assert set().union(*(cases[index] for index in kept)) == set().union(*cases)
    assert kept == sorted(set(kept)) and len(kept) >= round(share * len(cases))
    assert len(kept) <= max(round(share * len(cases)), sum(sizes))


@pytest.mark.parametrize(
    ("marker", "full", "passed"),
    [
        ("@pytest.mark.broad", "", 5),
        ("@pytest.mark.broad(0.75)", "", 7),
        ("@pytest.mark.broad", "1", 9),
        ("", "", 9),
    ],
)
def test_a_family_is_tried_in_part_unless_all_is_asked_for(pytester, monkeypatch, marker, full, passed):
    monkeypatch.setenv("CAMSHAFT_FULL_CONFORMANCE", "")
    monkeypatch.setenv("CAMSHAFT_FULL_MATRIX", full)
    pytester.makepyfile(FAMILY.format(marker=marker))
    result = pytester.runpytest_inprocess("-p", "broad", "-p", "no:xdist")
    result.assert_outcomes(passed=passed, deselected=9 - passed)


def test_a_case_that_is_asked_for_by_name_runs(pytester, monkeypatch):
    for name in COMPLETE:
        monkeypatch.setenv(name, "")
    path = pytester.makepyfile(FAMILY.format(marker="@pytest.mark.broad"))
    for ranks, row in product((1, 2), range(4)):
        result = pytester.runpytest_inprocess("-p", "broad", "-p", "no:xdist", f"{path}::test_family[{ranks}-{row}]")
        result.assert_outcomes(passed=1)


CLASSES = """
import pytest

class Family:
    @pytest.mark.parametrize("neighbour", range(4))
    def test_beside(self, neighbour):
        print("ran", type(self).__name__, neighbour)

class Test_one(Family):
    pass

class Test_two(Family):
    pass

class Test_three(Family):
    pass

pytestmark = pytest.mark.broad
"""


def test_classes_that_share_a_test_are_one_family(pytester, monkeypatch):
    for name in COMPLETE:
        monkeypatch.setenv(name, "")
    pytester.makepyfile(CLASSES)
    result = pytester.runpytest_inprocess("-p", "broad", "-p", "no:xdist", "-s", "-vv")
    result.assert_outcomes(passed=4, deselected=8)
    ran = [line.split("ran ")[1].split() for line in result.outlines if "ran " in line]
    assert {name for name, _ in ran} == {"Test_one", "Test_two", "Test_three"}
    assert {number for _, number in ran} == {"0", "1", "2", "3"}
