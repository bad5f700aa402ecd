"""Overlap changes no bit, whenever messages and steps come; a missing wait would be seen."""

import random
import time

import pytest
from zero_cases import assert_same, train_unseen

from camshaft import comm
from camshaft.plugin import Plugin, hookimpl
from camshaft_zero.gatherer import Gatherer
from camshaft_zero.publisher import Publisher

COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather", "broadcast")


class Delays(Plugin):
    """One rank after the other, a step each, sleeps 1 to 30 ms around collectives, waits and the optimizer's step."""

    def __init__(self, seed, turn=None):
        super().__init__()
        self.chooser, self.turn, self.sleeps = random.Random(seed), turn, 0

    @hookimpl
    def bind(self, state):
        self.state = state
        for name in COLLECTIVES:
            setattr(comm.Channel, name, self.slow(getattr(comm.Channel, name)))
        comm.Pending.wait = self.slow(comm.Pending.wait)

    def nap(self, often=0.25):
        turn = self.state.step % self.state.world.world_size if self.turn is None else self.turn
        if turn == self.state.world.rank and self.chooser.random() < often:
            self.sleeps += 1
            time.sleep(self.chooser.uniform(0.001, 0.03))

    def slow(self, call):
        def delayed(*arguments, **named):
            self.nap()
            result = call(*arguments, **named)
            self.nap()
            return result

        return delayed

    @hookimpl
    def around_step(self, call):
        def step():
            self.nap(often=1.0)
            call()

        return step

    @hookimpl
    def close(self, state, status):
        assert status == "failed" or self.sleeps > 5 or self.turn not in (None, state.world.rank)


@pytest.mark.parametrize(("row", "ranks"), [("1", 2), ("2", 3), ("3", 2), ("3 last", 2), ("hybrid 3", 4)])
def test_delays_and_overlap_change_no_bit(make_recipe, row, ranks):
    undisturbed = train_unseen(make_recipe, row, ranks)
    for disturbed in (
        train_unseen(make_recipe, row, ranks, overlap=False),
        train_unseen(make_recipe, row, ranks, extra={"delays": Delays(ranks)}),
    ):
        for (mine, _), (wanted, _) in zip(disturbed, undisturbed, strict=True):
            assert_same(mine, wanted)


@pytest.mark.parametrize("row", ["1", "3"])
def test_evaluation_between_steps_changes_no_bit(make_recipe, row):
    data = make_recipe({}).tree["data"] | {"validation_fraction": 0.1}
    plain, evaluated = (
        train_unseen(
            make_recipe,
            row,
            2,
            extra={"delays": Delays(7)},
            sections={"data": data, "training": {"max_steps": 5, **evaluation}},
        )
        for evaluation in ({}, {"eval_every": 1, "eval_samples": 8})
    )
    for (mine, _), (wanted, _) in zip(evaluated, plain, strict=True):
        assert_same(mine, wanted)


@pytest.mark.parametrize("variant", ["never called", "reads ahead"])
def test_weights_that_are_read_past_their_module_are_waited_for(make_recipe, variant):
    """The rank that is never late would read weights of the step before."""
    wanted = train_unseen(make_recipe, "1", 2, variant=variant, overlap=False)
    found = train_unseen(make_recipe, "1", 2, variant=variant, extra={"delays": Delays(5, turn=0)})
    for (mine, _), (whole, _) in zip(found, wanted, strict=True):
        assert_same(mine, whole)


class Forgets(Plugin):
    """A bug on purpose: lets modules go on without their parameters."""

    @hookimpl
    def shard_storage(self):
        self.kept = kept = []
        Publisher._hook = lambda publisher, module, units: lambda _, __: None
        Publisher.before_forward = lambda publisher: None

        def arrive(gatherer, seat):
            kept.append(seat.pending)
            seat.pending = None
            seat.show()

        Gatherer._arrive = arrive

    @hookimpl
    def post_reduce(self):
        for pending in self.kept:
            if pending is not None:
                pending.wait()
        self.kept.clear()


@pytest.mark.parametrize("row", ["1", "3"])
def test_a_missing_wait_would_be_seen(make_recipe, row):
    good = train_unseen(make_recipe, row, 2)
    bad = train_unseen(make_recipe, row, 2, extra={"forgets": Forgets(), "delays": Delays(3, turn=0)})
    with pytest.raises(AssertionError, match="unequal"):
        assert_same(bad[1][0], good[1][0])
