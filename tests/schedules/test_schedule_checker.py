"""What the checker says: rank, action and reason of each kind of fault."""

from __future__ import annotations

import pytest

from camshaft.errors import CamshaftError
from camshaft.program import Action, Kind
from camshaft_pipeline.checker import check_schedule
from camshaft_pipeline.errors import ScheduleError
from camshaft_pipeline.schedule import Schedule
from camshaft_pipeline.transfers import complete

END = "REDUCE CLIP STEP"


def schedule(*programs, placement=None, peak=None):
    """Programs written as words; stage r on rank r if nothing else is said."""
    parsed = tuple(tuple(map(Action.parse, program.split())) for program in programs)
    return Schedule("mine", placement or tuple(range(len(programs))), parsed, peak)


FIRST = f"F0 SEND_F0 F1 SEND_F1 RECV_B0 B0 RECV_B1 B1 {END}"
SECOND = f"RECV_F0@1 F0@1 B0@1 SEND_B0@1 RECV_F1@1 F1@1 I1@1 SEND_B1@1 W1@1 {END}"

WRONG_ORDER = (
    "rank 1, RECV_F0@1: takes message 0 from rank 0 to rank 1, and that is SEND_F1. "
    "Fix: put the receives of rank 1 into the order of rank 0's sends"
)
DEADLOCK = (
    "rank 0, RECV_B1: deadlock: rank 0 waits at RECV_B1 for the gradient of microbatch 1 out of stage 1 from rank 1, "
    "rank 1 waits at RECV_F1@1 for the activations of microbatch 1 out of stage 0 from rank 0, and so on, "
    "round and round"
)


def test_a_program_written_by_hand_passes_with_b_and_halves_mixed():
    check_schedule(schedule(FIRST, SECOND, peak=(2, 1)), 2)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (FIRST.replace("CLIP", ""), SECOND, "rank 0: a program ends with REDUCE, CLIP, STEP, once each; found REDUCE"),
        (FIRST, f"{SECOND} STEP", "rank 1: a program ends with REDUCE, CLIP, STEP"),
        (f"CLIP {FIRST}", SECOND, "rank 0: a program ends with REDUCE, CLIP, STEP, once each; found CLIP REDUCE CLIP"),
        (f"F0 {FIRST}", SECOND, "rank 0, F0: is there twice"),
        (f"F2 {FIRST}", SECOND, "rank 0, F2: there are 2 microbatches, from 0 on"),
        (f"F0@2 {FIRST}", SECOND, "rank 0, F0@2: there are 2 stages, from 0 on"),
        (f"F0@1 {FIRST}", SECOND, "rank 0, F0@1: stage 1 is on rank 1"),
        (f"UNSHARD {FIRST}", SECOND, "rank 0, UNSHARD: has no place in a pipeline's schedule"),
        (FIRST.replace(" B1", ""), SECOND, "rank 0, B1: is missing, and so are I1 and W1"),
        (FIRST, SECOND.replace(" W1@1", ""), "rank 1, W1@1: is missing"),
        (FIRST.replace(" B1", " B1 W1"), SECOND, "rank 0, W1: is part of B1, which is there too"),
        (FIRST.replace("F1 ", "", 1), SECOND, "rank 0, F1: is missing"),
        (
            FIRST,
            SECOND.replace("I1@1 SEND_B1@1 W1@1", "W1@1 I1@1 SEND_B1@1"),
            "W1@1: comes before I1@1, which it needs",
        ),
        (FIRST.replace("SEND_F0 F1", "F1"), SECOND, "rank 0, SEND_F0: is missing"),
        (FIRST, SECOND.replace("RECV_F1@1", ""), "rank 1, RECV_F1@1: is missing"),
        (FIRST.replace("F1 SEND_F1", "SEND_F1 F1"), SECOND, "rank 0, SEND_F1: comes before F1, which it needs"),
        (FIRST.replace("RECV_B0 B0", "B0 RECV_B0"), SECOND, "rank 0, B0: comes before RECV_B0, which it needs"),
        (f"SEND_B0 {FIRST}", SECOND, "rank 0, SEND_B0: there is no stage -1"),
        (FIRST, f"RECV_B0@1 {SECOND}", "rank 1, RECV_B0@1: there is no stage 2"),
        (
            f"F0 F1 SEND_F1 SEND_F0 RECV_B0 B0 RECV_B1 B1 {END}",
            SECOND,
            WRONG_ORDER,
        ),
        (
            f"F0 SEND_F0 RECV_B0 B0 RECV_B1 F1 SEND_F1 B1 {END}",
            SECOND,
            DEADLOCK,
        ),
    ],
)
def test_a_fault_is_named_by_rank_and_action(first, second, message):
    with pytest.raises(ScheduleError) as caught:
        check_schedule(schedule(first, second), 2)
    assert message in str(caught.value)
    assert isinstance(caught.value, CamshaftError) and isinstance(caught.value, ValueError)
    assert caught.value.rank == int(caught.value.place[5]) and caught.value.reason in str(caught.value)


def test_too_few_microbatches_are_too_few():
    with pytest.raises(ScheduleError, match="rank 0, B2: is missing, and so are I2 and W2"):
        check_schedule(schedule(FIRST, SECOND), 3)


def test_memory_is_what_the_schedule_says():
    with pytest.raises(ScheduleError, match="rank 0: holds 2 activations at once, and says 1"):
        check_schedule(schedule(FIRST, SECOND, peak=(1, 1)), 2)
    with pytest.raises(ScheduleError, match="says how much 1 ranks hold, and has 2"):
        check_schedule(schedule(FIRST, SECOND, peak=(2,)), 2)


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        ((0, 2), "stage 1 is placed on rank 2, and there are 2 ranks"),
        ((0, 0), "rank 1: holds no stage. Fix: give each rank a stage, or use fewer ranks"),
    ],
)
def test_stages_have_ranks_and_ranks_have_stages(placement, message):
    with pytest.raises(ScheduleError) as caught:
        check_schedule(schedule(FIRST, SECOND, placement=placement), 2)
    assert message in str(caught.value)


def test_stages_of_one_rank_hand_over_without_transfer_and_in_order():
    alone = f"F0 F0@1 B0@1 B0 {END}"
    check_schedule(schedule(alone, placement=(0, 0)), 1)
    for program, message in (
        (f"F0@1 F0 B0@1 B0 {END}", "rank 0, F0@1: comes before F0, which it needs"),
        (f"F0 F0@1 B0 I0@1 W0@1 {END}", "rank 0, B0: comes before I0@1, which it needs"),
        (f"F0 SEND_F0 F0@1 B0@1 B0 {END}", "SEND_F0: stages 0 and 1 are both on rank 0: nothing is transferred"),
    ):
        with pytest.raises(ScheduleError) as caught:
            check_schedule(schedule(program, placement=(0, 0)), 1)
        assert message in str(caught.value)


def test_a_cycle_of_many_ranks_is_told_in_part():
    """Every rank wants its gradient of microbatch 1 before it sends the activations of microbatch 1."""
    ranks = 9
    orders = [[Action(kind, m, rank) for m in (0, 1) for kind in (Kind.F, Kind.B)] for rank in range(ranks)]
    orders[3] = [Action(Kind.F, 1, 3), Action(Kind.B, 1, 3), Action(Kind.F, 0, 3), Action(Kind.B, 0, 3)]
    with pytest.raises(ScheduleError, match=r"deadlock: rank 0 waits at .* and so on, round and round") as caught:
        complete("mine", tuple(range(ranks)), orders)
    assert caught.value.rank == 0 and len(str(caught.value)) < 800


@pytest.mark.parametrize(
    ("orders", "message"),
    [
        (["F0 B0", "F0@1"], "rank 1, B0@1: is missing, and so are I0@1 and W0@1"),
        (["B0 F0", "F0@1 B0@1"], "rank 0, B0: comes before F0, which it needs"),
        (["UNSHARD F0 B0", "F0@1 B0@1"], "rank 0, UNSHARD: has no place"),
        (["F0 B0 F0@1", "B0@1"], "rank 0, F0@1: stage 1 is on rank 1"),
    ],
)
def test_only_whole_work_is_completed(orders, message):
    parsed = [tuple(map(Action.parse, order.split())) for order in orders]
    with pytest.raises(ScheduleError) as caught:
        complete("mine", (0, 1), parsed)
    assert message in str(caught.value)
