"""Every bug of the zoo is caught and its plugin named; the same recipes without the bug raise no alarm."""

import pytest
import zoo_catalogue as zoo

from camshaft.testing import Conformance
from camshaft.testing.conformance.resumed import check_resume
from camshaft.testing.conformance.trial import Trial, write_corpus
from camshaft.verify.examine import verify

SHOWN = [bug for bug in zoo.BUGS if bug.told_by != "resume"]


def without(bug: zoo.Bug) -> str:
    """What decides the recipe that ``bug`` is taken out of."""
    genuine = zoo.GENUINE.get(bug.plugin)
    return str((genuine, bug.options if genuine else {}, bug.ranks, bug.plugins, bug.model, bug.parallel, bug.data))


RIGHT = {without(bug): bug for bug in SHOWN}
"""Without the bug some recipes are the same: one of each."""
ids = [bug.plugin for bug in SHOWN]


@pytest.fixture(autouse=True)
def animals(monkeypatch):
    zoo.install(monkeypatch)


@pytest.mark.parametrize("bug", SHOWN, ids=ids)
def test_a_bug_is_caught_and_its_plugin_named(make_recipe, bug):
    report = verify(zoo.recipe(make_recipe, bug))
    assert report.finding is not None, "nothing was found"
    assert report.finding.plugins == (bug.plugin,), str(report.finding)


@pytest.mark.parametrize("bug", RIGHT.values(), ids=[bug.plugin for bug in RIGHT.values()])
def test_without_the_bug_there_is_no_alarm(make_recipe, bug):
    report = verify(zoo.recipe(make_recipe, bug, right=True))
    assert report.green, str(report.finding)


@pytest.mark.parametrize("name", ["repeats_samples", "checkpoint"])
def test_the_kit_catches_what_a_resumed_run_does_wrong(tmp_path, name):
    saving = {"checkpoint": None, name: {"every_steps": 2, "keep_last": 2}}

    class Saves(Conformance):
        plugin = name
        kind = "observer"
        recipe = {"plugins": saving}

    trial = Trial({"plugins": saving}, write_corpus(tmp_path / "corpus"), tmp_path / "trial", "fp64", 0.1)
    if name == "checkpoint":
        check_resume(Saves(), trial)
        return
    with pytest.raises(AssertionError):
        check_resume(Saves(), trial)


def test_there_are_enough_and_each_has_its_report():
    assert len(zoo.BUGS) >= 16 and len({bug.plugin for bug in zoo.BUGS}) == len(zoo.BUGS)
    assert all(bug.report.startswith("https://github.com/") for bug in zoo.BUGS)
