"""Reducers and gathers of one rank that has several pipeline stages, in random legal orders of their work."""

import pytest
from parallel_cases import EXACT, ROWS, plugins, reference, training
from staged_model import Staged, change, legal_order

from camshaft.comm import Channel
from camshaft.plugin import Plugin, hookimpl
from camshaft.program import Action, Kind
from camshaft.testing.compare import assert_bit_equal, assert_within, compare
from camshaft.testing.ranks import RankFailed
from camshaft.testing.run import record_ranks

pytestmark = pytest.mark.broad

STEPS = 4
VARIANTS = {"plain": {}, "frozen": {"frozen": ("layers.2.", "norm")}, "picky": {"picky": True}}


def run_program(make_recipe, row, ranks, observers):
    hybrid = {"parallel": {"data_parallel_shard": 2}} if row.startswith("hybrid") else {}
    batch = {"micro_batch_size": 4 // ranks, "global_batch_size": 12}
    resolved = make_recipe(plugins(row), ranks, batch=batch, training=training(STEPS), **hybrid)
    records = record_ranks(resolved, ranks, observers)
    for other in records[1:]:
        assert_bit_equal(records[0], other)
    return records[0]


CASES = [
    *((row, 2, False, "plain") for row in ROWS if row != "none" and not row.startswith("hybrid")),
    *((row, 2, True, "picky") for row in ROWS if row != "none" and not row.startswith("hybrid")),
    ("ddp", 2, True, "frozen"),
    ("zero 2", 2, True, "frozen"),
    ("zero 3", 2, True, "frozen"),
    ("hybrid 2", 4, True, "plain"),
    ("hybrid 3", 4, True, "picky"),
    ("hybrid 1, optimizer along both", 4, False, "picky"),
    ("hybrid 3, optimizer along both", 4, True, "plain"),
]


@pytest.mark.parametrize(("row", "ranks", "split", "variant"), CASES)
def test_stages_in_any_order_make_what_one_process_makes(make_recipe, row, ranks, split, variant):
    wanted = reference(make_recipe, STEPS, variant, lambda model: change(model, **VARIANTS[variant]))
    seed = f"{row} {split} {variant}"
    stages = Staged(legal_order(seed, 3, split), **VARIANTS[variant])
    assert_within(compare(run_program(make_recipe, row, ranks, {"stages": stages}), wanted), EXACT)


class Started(Plugin):
    """Counts the sums of gradients that are under way before the window's last backward begins."""

    def __init__(self, least):
        super().__init__()
        self.least, self.calls, self.found = least, [], 0

    @hookimpl
    def bind(self):
        Channel.observer = self.calls.append

    @hookimpl
    def post_backward(self, state):
        if not state.last_backward:
            self.found = sum(call.hook == "reduce" and call.op != "broadcast" for call in self.calls)

    @hookimpl
    def post_step(self):
        assert self.found >= self.least, f"{self.found} sums have started, {self.calls}"
        self.calls.clear()


@pytest.mark.parametrize(("row", "least"), [("ddp", 4), ("zero 2 last", 4), ("zero 3 last", 2)])
def test_sums_of_a_stage_that_is_done_travel_while_another_works(make_recipe, row, least):
    """Stage by stage: when the last backward begins, two of three stages have all of their gradients."""
    program = [Action(Kind.F, m, s) for s in range(3) for m in range(3)]
    program += [Action(Kind.B, m, s) for s in (2, 1, 0) for m in range(3)]
    wanted = reference(make_recipe, STEPS, "plain", change)
    observers = {"stages": Staged(program), "started": Started(least)}
    assert_within(compare(run_program(make_recipe, row, 2, observers), wanted), EXACT)


def test_a_gradient_in_a_stage_that_does_not_have_the_parameter_is_named(make_recipe):
    class Wrong(Staged):
        @hookimpl
        def split(self, world, model):
            super().split(world, model)
            world.stages["model.norm.weight"] = 0
            return model

    for row in ("ddp", "zero 2"):
        with pytest.raises(RankFailed, match=r"'model.norm.weight' came in the backward of stage 2, .* has it in 0"):
            run_program(make_recipe, row, 2, {"stages": Wrong(legal_order("wrong", 3, False))})


@pytest.mark.parametrize("row", ["ddp", "zero 2", "zero 3"])
def test_a_tie_of_which_the_stage_of_one_name_is_not_told(make_recipe, row):
    """It may get gradients in any stage: it is complete when all are."""
    stages = Staged(legal_order(row, 3, True), shared=False)
    wanted = reference(make_recipe, STEPS, "plain", change)
    assert_within(compare(run_program(make_recipe, row, 2, {"stages": stages}), wanted), EXACT)
