"""What overlap promises, seen where messages begin: sums start between gathers, weights on their way are awaited."""

import pytest
from zero_cases import assert_same, plugins, sections, train_unseen

from camshaft import comm
from camshaft.plugin import Plugin, hookimpl
from camshaft.testing.ranks import run_ranks
from camshaft.testing.run import record_rank


class Sequence(Plugin):
    """Operations of `zero` in the order in which they begin, from the last step's backward on."""

    @hookimpl
    def bind(self):
        self.begun = []
        comm.Channel.observer = self.note

    def note(self, call):
        if call.plugin == "zero" and call.op in ("all_gather", "reduce_scatter"):
            self.begun.append(call.op)

    @hookimpl
    def around_forward(self, state, call):
        def forward(batch):
            loss = call(batch)
            self.begun.clear()
            return loss

        return forward

    @hookimpl
    def around_step(self, call):
        def step():
            self.backward = list(self.begun)
            call()

        return step


def begun(rank, world_size, resolved):
    sequence = Sequence()
    record_rank(rank, world_size, resolved, {"sequence": sequence})
    return sequence.backward


def test_sums_of_stage_3_begin_between_the_gathers_of_backward(make_recipe):
    resolved = make_recipe(plugins("3"), 2, **sections("3", 2, 3, 5))
    for operations in run_ranks(2, begun, resolved):
        last_gather = len(operations) - 1 - operations[::-1].index("all_gather")
        assert operations.count("all_gather") == 2, "of 3 blocks the last one is still there after forward"
        assert operations.count("reduce_scatter") == 4, "each unit is summed once a microbatch"
        assert operations.index("reduce_scatter") < last_gather


class Late:
    """A gather whose values are there only when somebody has waited for them."""

    def __init__(self, pending, output, fresh):
        self.pending, self.output, self.fresh = pending, output, fresh

    def wait(self):
        self.pending.wait()
        self.output.copy_(self.fresh)


class AtTheLastMoment(Plugin):
    """What is sent after a step arrives no sooner than it is waited for: whoever does not wait reads old weights."""

    @hookimpl
    def bind(self):
        self.late = 0
        original = comm.Channel.all_gather

        def all_gather(channel, output, source, hook):
            if hook != "step":
                return original(channel, output, source, hook)
            self.late += 1
            fresh = output.clone()
            return Late(original(channel, fresh, source, hook), output, fresh)

        comm.Channel.all_gather = all_gather

    @hookimpl
    def close(self, status):
        assert status == "failed" or self.late > 5


@pytest.mark.parametrize("variant", ["never called", "reads ahead"])
def test_weights_that_no_module_waits_for_are_waited_for_before_forward(make_recipe, variant):
    single = {"variant": variant, "bucket_size_mb": 1e-5}  # a parameter each: none waits for a neighbour's sake
    wanted = train_unseen(make_recipe, "1", 2, overlap=False, **single)
    found = train_unseen(make_recipe, "1", 2, extra={"late": AtTheLastMoment()}, **single)
    for (mine, _), (whole, _) in zip(found, wanted, strict=True):
        assert_same(mine, whole)
