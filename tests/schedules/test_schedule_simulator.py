"""The clock: worked by hand for small tables, and laws that hold for every schedule and all times."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from camshaft.program import COMPUTE, Action, Kind
from camshaft_pipeline.errors import ScheduleError
from camshaft_pipeline.replay import Times
from camshaft_pipeline.schedules import FAMILIES, make
from camshaft_pipeline.simulator import simulate
from camshaft_pipeline.transfers import complete


def moments(spans):
    return [(str(span.action), span.start, span.end) for span in spans]


def test_two_stages_of_different_cost_by_hand():
    """Stage 0: F 2, B 1 + 2; stage 1: F 4, B 3 + 2; a message takes 1."""
    timeline = simulate(make("1f1b", 2, 2), Times((2, 4), (1, 3), (2, 2), transfer=1))
    assert moments(timeline.spans[0]) == [("F0", 0, 2), ("F1", 2, 4), ("B0", 13, 16), ("B1", 22, 25)]
    assert moments(timeline.spans[1]) == [("F0@1", 3, 7), ("B0@1", 7, 12), ("F1@1", 12, 16), ("B1@1", 16, 21)]
    assert moments(timeline.transfers) == [
        ("SEND_F0", 2, 3), ("SEND_F1", 4, 5), ("SEND_B0@1", 12, 13), ("SEND_B1@1", 21, 22),
    ]  # fmt: skip
    assert (timeline.makespan, timeline.busy, timeline.ideal) == (25, (10, 18), 18)
    assert (timeline.idle, timeline.bubble, timeline.stretch) == (7, 7 / 18, 25)
    assert timeline.peak == (2, 1)


def test_a_link_carries_one_message_at_a_time():
    timeline = simulate(make("gpipe", 2, 3), Times(1, 1, 1, transfer=5))
    sent = [span for span in timeline.transfers if span.rank == 0]
    assert [(span.start, span.end) for span in sent] == [(1, 6), (6, 11), (11, 16)]
    assert [span.start for span in timeline.spans[1] if span.action.kind is Kind.F] == [6, 11, 16]


def test_split_backward_sends_before_its_weights_are_done():
    orders = [[Action(Kind.F), Action(Kind.I), Action(Kind.W)], [Action(Kind.F), Action(Kind.I), Action(Kind.W)]]
    orders = [[a._replace(microbatch=0, stage=rank) for a in order] for rank, order in enumerate(orders)]
    split = simulate(complete("split", (0, 1), orders), Times(1, 1, 4))
    assert split.makespan == 8  # F F I I W; with B it would be 12
    whole = [[orders[r][0], orders[r][0]._replace(kind=Kind.B)] for r in (0, 1)]
    assert simulate(complete("whole", (0, 1), whole), Times(1, 1, 4)).makespan == 12


def random_times(chooser, stages):
    def some():
        return tuple(Fraction(chooser.randint(1, 9), 3) for _ in range(stages))

    return Times(some(), some(), some(), Fraction(chooser.randint(0, 6), 3))


@pytest.mark.parametrize("name", FAMILIES)
def test_laws_of_the_clock_hold_for_any_times(name):
    chooser = random.Random(name)
    for _ in range(60):
        p, m = chooser.randint(1, 5), chooser.randint(1, 9)
        schedule = make(name, p, m)
        times = random_times(chooser, schedule.stages)
        timeline, table = simulate(schedule, times), times.table(schedule.stages)
        ends = {span.action: span.end for spans in timeline.spans for span in spans}
        assert len(ends) == sum(action.kind in COMPUTE for program in schedule.programs for action in program)
        arrived = {(span.action.kind, *span.action[1:]): span for span in timeline.transfers}
        for rank, spans in enumerate(timeline.spans):
            free = 0
            for kind, microbatch, stage in (span.action for span in spans):
                (span,) = (each for each in spans if each.action == (kind, microbatch, stage))
                ready = _ready(schedule, ends, arrived, times, span)
                assert span.start == max(free, ready)  # neither early nor late
                assert span.end - span.start == table[kind][stage] and span.rank == rank
                free = span.end
        assert timeline.makespan >= timeline.ideal == max(timeline.busy) and timeline.stretch <= timeline.makespan


def _ready(schedule, ends, arrived, times, span):
    """When what ``span`` needs from another stage is there."""
    kind, microbatch, stage = span.action
    if kind is Kind.W:
        return 0
    source = stage + (-1 if kind is Kind.F else 1)
    if not 0 <= source < schedule.stages:
        return 0
    made = next(
        ends[found]
        for found in (Action(each, microbatch, source) for each in ((Kind.F,) if kind is Kind.F else (Kind.B, Kind.I)))
        if found in ends
    )
    if schedule.placement[source] == span.rank:
        return made
    transfer = arrived[Kind.SEND_F if kind is Kind.F else Kind.SEND_B, microbatch, source]
    assert transfer.start >= made and transfer.end == transfer.start + times.transfer
    return transfer.end


def test_slower_things_never_make_a_window_shorter():
    chooser = random.Random(4)
    for name in FAMILIES:
        schedule = make(name, 4, 8)
        times = random_times(chooser, schedule.stages)
        before = simulate(schedule, times).makespan
        for field in ("forward", "inputs", "weights", "transfer"):
            value = getattr(times, field)
            slower = value + 1 if field == "transfer" else tuple(each + 1 for each in value)
            assert simulate(schedule, Times(**{**vars(times), field: slower})).makespan >= before


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (Times(forward=(1, 2, 3)), "3 times of 'forward' for 2 stages. Fix: give one number, or one for each stage"),
        (Times(weights=(1, -2)), "times of 'weights' must not be negative, got -2"),
        (Times(transfer=-1), "times of 'transfer' must not be negative, got -1"),
        (Times(inputs=float("nan")), "times of 'inputs' must not be negative, got nan"),
    ],
)
def test_times_that_do_not_fit_are_refused(times, message):
    with pytest.raises(ScheduleError) as caught:
        simulate(make("gpipe", 2, 2), times)
    assert message in str(caught.value)


def test_work_that_takes_no_time_has_no_bubble():
    assert simulate(make("1f1b", 2, 3), Times(0, 0, 0)).bubble == 0.0
