"""Schedules of other packages: found by name, checked as ours are, and refused with reasons."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from types import ModuleType

import pytest

import camshaft.schedules
from camshaft.errors import MachineError, PluginError
from camshaft.program import Action, Kind
from camshaft.schedules import GROUP, Offer
from camshaft_pipeline import planning, schedules
from camshaft_pipeline.errors import ScheduleError


def reverse(rank, ranks, microbatches, v):
    """All forwards, then all backwards, the last first."""
    forward = [Action(Kind.F, microbatch, rank) for microbatch in range(microbatches)]
    return forward + [Action(Kind.B, microbatch, rank) for microbatch in reversed(range(microbatches))]


def raises(rank, ranks, microbatches, v):
    raise ZeroDivisionError("by zero")


OFFERS = {
    "reverse": Offer(reverse, peak=lambda rank, ranks, microbatches, v: microbatches),
    "boastful": Offer(reverse, peak=lambda rank, ranks, microbatches, v: 1),
    "lazy": Offer(lambda rank, ranks, microbatches, v: reverse(rank, ranks, microbatches, v)[:-1]),
    "twice": Offer(lambda rank, ranks, microbatches, v: reverse(rank, ranks, microbatches, v) * 2),
    "hasty": Offer(lambda rank, ranks, microbatches, v: sorted(reverse(rank, ranks, microbatches, v), key=str)),
    "elsewhere": Offer(lambda rank, ranks, microbatches, v: reverse(0, ranks, microbatches, v)),
    "raises": Offer(raises),
    "bare": reverse,
}


@pytest.fixture(autouse=True)
def offers(monkeypatch):
    module = ModuleType("strangers")
    for name, offer in OFFERS.items():
        setattr(module, name, offer)
    monkeypatch.setitem(sys.modules, "strangers", module)
    points = [EntryPoint(name, f"strangers:{name}", GROUP) for name in OFFERS]
    points.append(EntryPoint("missing", "no_such_module:OFFER", GROUP))
    monkeypatch.setattr(camshaft.schedules, "entry_points", lambda group: points if group == GROUP else [])
    for cache in (camshaft.schedules.offered, schedules.make, planning._made):
        cache.cache_clear()
    yield points
    for cache in (camshaft.schedules.offered, schedules.make, planning._made):
        cache.cache_clear()


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 1), (2, 5), (4, 3)])
def test_an_offered_schedule_is_completed_and_passes_the_check(ranks, microbatches):
    made = planning._made("reverse", ranks, microbatches, None)
    assert (made.name, made.ranks, made.microbatches) == ("reverse", ranks, microbatches)
    sent = [action for action in made.programs[0] if action.kind is Kind.SEND_F]
    assert [action.microbatch for action in sent] == list(range(microbatches))
    backwards = [action.microbatch for action in made.programs[-1] if action.kind is Kind.B]
    assert backwards == list(reversed(range(microbatches)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("boastful", "holds 3 activations at once, and says 1"),
        ("lazy", "B0: is missing, and so are I0 and W0"),
        ("twice", "is there twice"),
        ("hasty", "B0: comes before F0"),
        ("elsewhere", "stage 0 is on rank 0"),
        ("raises", "raises failed for 2 ranks and 3 microbatches: ZeroDivisionError"),
        ("revers", "there is no schedule 'revers'.*did you mean reverse"),
        ("xyz", "use one of gpipe, 1f1b.*boastful"),
    ],
)
def test_a_faulty_one_is_refused_with_the_place(name, message):
    with pytest.raises(ScheduleError, match=message):
        planning._made(name, 2, 3, None)


def test_what_is_no_offer_and_what_cannot_be_imported_is_named():
    with pytest.raises(PluginError, match=r"'bare'.*strangers:bare is not a camshaft.schedules.Offer"):
        schedules.make("bare", 2, 3)
    with pytest.raises(PluginError, match=r"'missing'.*no_such_module:OFFER cannot be imported"):
        schedules.make("missing", 2, 3)


def test_a_name_that_two_packages_offer_is_refused(offers):
    offers.append(EntryPoint("reverse", "others:reverse", GROUP))
    with pytest.raises(MachineError, match="schedule 'reverse' is offered twice"):
        schedules.make("reverse", 2, 3)


def test_virtual_stages_keep_to_what_is_offered():
    with pytest.raises(ScheduleError, match="reverse has 1 virtual stages a rank, got 2"):
        schedules.make("reverse", 2, 3, 2)
