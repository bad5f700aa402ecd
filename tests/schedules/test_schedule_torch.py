"""torch's own schedules beside ours: the same orders where they are the same, never faster, and all of them sound."""

from __future__ import annotations

import pytest

from camshaft.program import Action, Kind
from camshaft_pipeline.checker import check_schedule
from camshaft_pipeline.replay import Times
from camshaft_pipeline.schedule import loop_placement, v_placement, without_transfers
from camshaft_pipeline.schedules import make
from camshaft_pipeline.simulator import simulate
from camshaft_pipeline.transfers import complete

visualizer = pytest.importorskip("torch.distributed.pipelining._schedule_visualizer")

KINDS = {"FORWARD": Kind.F, "FULL_BACKWARD": Kind.B, "BACKWARD_INPUT": Kind.I, "BACKWARD_WEIGHT": Kind.W}


def torch_orders(name, p, m, v):
    """What torch's schedule computes, a list of actions for each rank; pairs of F and B one after the other."""
    found = []
    for row in visualizer.get_schedule_ops(name, p, m, v):
        single = [sub for action in row if action is not None for sub in (action.sub_actions or (action,))]
        found.append(
            [
                Action(KINDS[action.computation_type.name], action.microbatch_index, action.stage_index)
                for action in single
                if action.computation_type.name in KINDS
            ]
        )
    return found


SIZES = [(2, 4), (2, 8), (3, 6), (4, 8), (4, 16), (8, 16)]
SAME = [
    ("GPipe", "gpipe", 1), ("1F1B", "1f1b", 1), ("LoopedBFS", "gpipe", 3), ("Interleaved1F1B", "interleaved_1f1b", 2),
    ("Interleaved1F1B", "interleaved_1f1b", 3), ("ZBVZeroBubble", "zbv", 2), ("DualPipeV", "dualpipe_v", 2),
]  # fmt: skip


@pytest.mark.parametrize(("theirs", "ours", "v"), SAME)
@pytest.mark.parametrize(("p", "m"), SIZES)
def test_published_orders_are_the_same_as_torchs(theirs, ours, v, p, m):
    orders, schedule = torch_orders(theirs, p, m, v), make(ours, p, m, v)
    if theirs == "LoopedBFS":  # there the microbatches of a backward come last one first
        orders = [[*row[: v * m], *sorted(row[v * m :], key=lambda a: (-a.stage, a.microbatch))] for row in orders]
    ranks = p - 1 if theirs == "1F1B" else p  # torch's table of 1F1B (not its execution) starts the last rank with F1
    assert [list(without_transfers(program)) for program in schedule.programs[:ranks]] == orders[:ranks]


@pytest.mark.parametrize(("theirs", "v"), [("InterleavedZeroBubble", 2), ("InterleavedZeroBubble", 3)])
@pytest.mark.parametrize(("p", "m"), SIZES)
def test_a_schedule_of_torch_that_we_do_not_ship_is_checked_and_simulated(theirs, v, p, m):
    """ZB1P over interleaved stages: on the clock, ZBV's cost is at most its cost, for the same number of layers."""
    schedule = complete(theirs, loop_placement(p, v), torch_orders(theirs, p, m, v))
    check_schedule(schedule, m)
    timeline = simulate(schedule, Times(6 / v, 6 / v, 6 / v))
    zbv = simulate(make("zbv", p, m), Times(3, 3, 3))
    assert timeline.ideal == zbv.ideal == 18 * m
    assert timeline.stretch >= zbv.stretch and max(timeline.peak) / v >= max(zbv.peak) / 2


def test_fewer_microbatches_than_the_v_takes_are_left_out_as_torch_does():
    for p, m in ((4, 1), (4, 3), (4, 6), (6, 10)):
        orders = torch_orders("ZBVZeroBubble", p, m, 2)
        schedule = make("zbv", p, m)
        assert schedule.placement == v_placement(p)
        assert [list(without_transfers(program)) for program in schedule.programs] == orders
