"""Random mutations of valid programs: every one that does harm is caught, and one that does none is not.

Harmless changes are left out by construction: nothing here exchanges two actions of a rank unless one needs the other,
or both are messages of one link. What such an exchange of independent neighbours does is tried apart, below.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from camshaft.program import CLOSING, COMPUTE, TRANSFERS, Action, Kind
from camshaft_pipeline.checker import check_schedule
from camshaft_pipeline.errors import ScheduleError
from camshaft_pipeline.replay import RECVS, SENDS
from camshaft_pipeline.schedules import FAMILIES, make


class Mutable:
    """A schedule whose programs are lists, and a chooser of places in them."""

    def __init__(self, name, seed):
        self.chooser = random.Random(f"{name}{seed}")
        v = 1 if name in ("1f1b", "zb_h1") else 2
        self.m = self.chooser.randint(2, 7)
        self.schedule = make(name, self.chooser.randint(2, 4), self.m, v)
        self.programs = [list(program) for program in self.schedule.programs]
        self.rank = self.chooser.randrange(len(self.programs))
        self.program = self.programs[self.rank]

    def any(self, kinds):
        return self.chooser.choice([index for index, action in enumerate(self.program) if action.kind in kinds])

    def other(self, value, values):
        return self.chooser.choice([each for each in values if each != value])

    def exchange(self, one, two):
        self.program[one], self.program[two] = self.program[two], self.program[one]

    def link(self, kinds):
        """Two places of messages to, or from, the same rank."""
        found = {}
        for index, action in enumerate(self.program):
            if action.kind in kinds:
                found.setdefault(self.schedule.peer(self.rank, action), []).append(index)
        return self.chooser.sample(self.chooser.choice([each for each in found.values() if len(each) > 1]), 2)

    def changed(self):
        return replace(self.schedule, programs=tuple(map(tuple, self.programs)))


EVERYTHING = (*COMPUTE, *TRANSFERS, *CLOSING)


def drop(it):
    del it.program[it.any(EVERYTHING)]


def duplicate(it):
    it.program.insert(it.chooser.randrange(len(it.program)), it.program[it.any(EVERYTHING)])


def swap_dependent(it):
    """An action and one that needs it on the same rank: exchange them."""
    then = it.any((Kind.B, Kind.I, Kind.W, *SENDS))
    kind, microbatch, stage = it.program[then]
    if kind in SENDS:
        first = (Kind.F,) if kind is Kind.SEND_F else (Kind.B, Kind.I)
    else:
        first = (Kind.I,) if kind is Kind.W else (Kind.F,)
    needed = next(i for i, a in enumerate(it.program) if a.kind in first and a[1:] == (microbatch, stage))
    it.exchange(needed, then)


def swap_received(it):
    """A receive and the computation that needs it."""
    first = it.any(RECVS)
    kind, microbatch, stage = it.program[first]
    users = (Kind.F,) if kind is Kind.RECV_F else (Kind.B, Kind.I)
    it.exchange(first, next(i for i, a in enumerate(it.program) if a.kind in users and a[1:] == (microbatch, stage)))


def change_stage(it):
    place = it.any((*COMPUTE, *TRANSFERS))
    action = it.program[place]
    it.program[place] = action._replace(stage=it.other(action.stage, range(-1, it.schedule.stages + 1)))


def change_microbatch(it):
    place = it.any((*COMPUTE, *TRANSFERS))
    action = it.program[place]
    it.program[place] = action._replace(microbatch=it.other(action.microbatch, range(-1, it.m + 1)))


def change_kind(it):
    place = it.any(EVERYTHING)
    it.program[place] = it.program[place]._replace(kind=it.other(it.program[place].kind, Kind))


def change_peer(it):
    """The other end of a transfer: to the other neighbour, or to another rank altogether."""
    place = it.any(TRANSFERS)
    action = it.program[place]
    turned = {Kind.SEND_F: Kind.SEND_B, Kind.SEND_B: Kind.SEND_F, Kind.RECV_F: Kind.RECV_B, Kind.RECV_B: Kind.RECV_F}
    if it.chooser.random() < 0.5:
        it.program[place] = action._replace(kind=turned[action.kind])
    else:
        del it.program[place]
        program = it.programs[it.other(it.rank, range(len(it.programs)))]
        program.insert(it.chooser.randrange(len(program)), action)


def reorder_sends(it):
    it.exchange(*it.link(SENDS))


def reorder_receives(it):
    it.exchange(*it.link(RECVS))


def wait_for_oneself(it):
    """A gradient is received before the activations that it comes from are sent."""
    sends = [i for i, a in enumerate(it.program) if a.kind is Kind.SEND_F]
    if not sends:  # the last rank only sends gradients: let it send one before it has the activations
        reorder_sends(it)
        return
    first = it.chooser.choice(sends)
    back = it.program.index(Action(Kind.RECV_B, *it.program[first][1:]))
    it.program.insert(first, it.program.pop(back))


def move_stage(it):
    stage = it.chooser.randrange(it.schedule.stages)
    placement = list(it.schedule.placement)
    placement[stage] = it.other(placement[stage], range(-1, len(it.programs) + 1))
    it.schedule = replace(it.schedule, placement=tuple(placement))


def hold_more(it):
    """The bound of one rank is a little too low, as if its program ran a forward too early."""
    peak = list(it.schedule.peak)
    peak[it.rank] -= 1
    it.schedule = replace(it.schedule, peak=tuple(peak))


def forget_a_rank(it):
    it.programs.pop()


MUTATIONS = {
    each.__name__: each
    for each in (
        drop, duplicate, swap_dependent, swap_received, change_stage, change_microbatch, change_kind, change_peer,
        reorder_sends, reorder_receives, wait_for_oneself, move_stage, hold_more, forget_a_rank,
    )
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_mutations_are_caught(name, mutation):
    for seed in range(20):  # times 14 mutations: 280 of each schedule
        it = Mutable(name, f"{mutation}{seed}")
        check_schedule(it.schedule, it.m)
        before = it.schedule
        MUTATIONS[mutation](it)
        assert it.changed() != before
        with pytest.raises(ScheduleError):
            check_schedule(it.changed(), it.m)


@pytest.mark.parametrize("name", FAMILIES)
def test_independent_neighbours_may_change_places(name):
    """Not everything is refused: sends to two ranks, receives from two, a send and a receive, a send and other work."""
    tried = 0
    for seed in range(40):
        it = Mutable(name, seed)
        place = it.chooser.randrange(len(it.program) - 4)
        one, two = it.program[place : place + 2]
        kinds = {one.kind, two.kind}
        link = [it.schedule.peer(it.rank, each) if each.kind in TRANSFERS else None for each in (one, two)]
        same_link = link[0] == link[1] and (kinds <= set(SENDS) or kinds <= set(RECVS))
        if one[1:] == two[1:] or same_link or not kinds & set(SENDS) or kinds & set(RECVS):
            continue  # one may need the other: refused, and tried above
        it.exchange(place, place + 1)
        check_schedule(it.changed(), it.m)
        tried += 1
    assert tried
