"""Every shipped schedule passes the checker, for any numbers; and ends even where no send is buffered."""

from __future__ import annotations

import random
import time

import pytest

from camshaft.program import Kind, check
from camshaft_pipeline.checker import check_schedule, live_activations
from camshaft_pipeline.replay import SENDS, Times
from camshaft_pipeline.schedule import message
from camshaft_pipeline.schedules import FAMILIES, make
from camshaft_pipeline.simulator import simulate

TRANSFERS = (Kind.SEND_F, Kind.RECV_F, Kind.SEND_B, Kind.RECV_B)


def numbers(name, count, seed=0, ranks=5, microbatches=11):
    """``count`` random (p, m, v) that the schedule takes; also m < p, m = 1, and m that p does not divide."""
    family, chooser = FAMILIES[name], random.Random(f"{name}{seed}")
    for _ in range(count):
        most = 3 if family.most is None else family.most
        yield chooser.randint(1, ranks), chooser.randint(1, microbatches), chooser.randint(family.least, most)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_thousand_random_sizes_pass_the_checker_and_hold_what_they_say(name):
    for p, m, v in numbers(name, 1000):
        schedule = make(name, p, m, v)
        check_schedule(schedule, m)
        assert schedule.microbatches == m and schedule.stages == p * v
        assert schedule.peak == tuple(map(live_activations, schedule.programs)), (p, m, v)
        for program in schedule.programs:
            assert check(program, m, name) == program  # the core's own view of one rank


def rendezvous(schedule):
    """Run programs where a send waits for its receive and everything else waits for its rank; return what is left."""
    todo = [list(program) for program in schedule.programs]
    moved = True
    while moved:
        moved = False
        for rank, mine in enumerate(todo):
            while mine and mine[0].kind not in TRANSFERS:
                mine.pop(0)
                moved = True
            if mine and mine[0].kind in SENDS:
                peer = todo[schedule.peer(rank, mine[0])]
                if peer and peer[0].kind in TRANSFERS and message(peer[0]) == message(mine[0]) and peer is not mine:
                    mine.pop(0)
                    peer.pop(0)
                    moved = True
    return [mine for mine in todo if mine]


@pytest.mark.parametrize("name", FAMILIES)
def test_even_unbuffered_sends_end(name):
    for p, m, v in numbers(name, 60, seed=1, ranks=6, microbatches=14):
        assert rendezvous(make(name, p, m, v)) == [], (p, m, v)


def test_unbuffered_sends_would_be_noticed_where_they_wait_forever():
    schedule = make("1f1b", 2, 2)
    first, second = (list(program) for program in schedule.programs)
    first.remove(next(action for action in first if action.kind is Kind.SEND_F))
    assert rendezvous(type(schedule)("broken", schedule.placement, (tuple(first), tuple(second)))) != []


@pytest.mark.parametrize("name", ["zbv", "dualpipe_v"])
def test_the_last_rank_of_a_v_hands_over_to_itself(name):
    schedule = make(name, 3, 6)
    assert schedule.placement == (0, 1, 2, 2, 1, 0) and schedule.stages_of(2) == (2, 3)
    crossing = {(a.kind, a.stage) for a in schedule.programs[2] if a.kind in TRANSFERS}
    assert crossing == {(Kind.RECV_F, 2), (Kind.SEND_B, 2), (Kind.SEND_F, 3), (Kind.RECV_B, 3)}


@pytest.mark.parametrize("name", FAMILIES)
def test_one_rank_has_no_transfers_and_no_bubble(name):
    schedule = make(name, 1, 5)
    assert not any(action.kind in TRANSFERS for action in schedule.programs[0])
    assert simulate(schedule, Times(3, 2, 1, transfer=99)).idle == 0


def test_a_send_follows_its_computation_at_once_and_peers_are_neighbours():
    schedule = make("interleaved_1f1b", 4, 8, 2)
    for rank, program in enumerate(schedule.programs):
        last = None
        for action in program:
            if action.kind in SENDS:
                assert (action.microbatch, action.stage) == (last.microbatch, last.stage)
                assert (last.kind is Kind.F) == (action.kind is Kind.SEND_F)
                assert (schedule.peer(rank, action) - rank) % 4 == (1 if action.kind is Kind.SEND_F else 3)
            elif action.kind not in TRANSFERS:
                last = action


def test_64_ranks_and_512_microbatches_take_seconds():
    start = time.process_time()
    schedule = make("zbv", 64, 512)
    check_schedule(schedule, 512)
    timeline = simulate(schedule)
    assert time.process_time() - start < 15  # about 4 s; of the processor's time, so that neighbours do not count
    assert timeline.stretch == 6 * 512 and sum(map(len, schedule.programs)) == 64 * (6 * 512 + 3) + 4 * 512 * 126


def test_making_is_a_pure_function_that_remembers():
    assert make("zbv", 4, 8) is make("zbv", 4, 8)
    make.cache_clear()
    assert make("zbv", 4, 8, 2).programs == make("zbv", 4, 8).programs
    assert len({hash(make(name, 2, 4)) for name in FAMILIES}) == len(FAMILIES)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("1f1p", 2, 4), "there is no schedule '1f1p'. Fix: did you mean 1f1b?"),
        (("spiral", 2, 4), "Fix: use one of gpipe, 1f1b"),
        (("1f1b", 2, 4, 2), "1f1b has 1 virtual stages a rank, got 2. Fix: use interleaved_1f1b"),
        (("interleaved_1f1b", 2, 4, 1), "at least 2 virtual stages a rank, got 1. Fix: use 1f1b"),
        (("zbv", 2, 4, 3), "zbv has 2 virtual stages a rank, got 3. Fix: set virtual_stages to 2, or leave it out"),
        (("gpipe", 2, 0), "needs ranks and microbatches, got 2 and 0"),
        (("gpipe", 2, 4, 0), "gpipe has at least 1 virtual stages a rank, got 0. Fix: set virtual_stages to 1"),
    ],
)
def test_what_cannot_be_made_is_refused_with_the_fix(arguments, words):
    with pytest.raises(ValueError) as caught:
        make(*arguments)
    assert words in str(caught.value)
