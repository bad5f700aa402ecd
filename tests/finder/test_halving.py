"""Microbatches that do not fit, run again in halves: the numbers of an undisturbed run, and refusals before any."""

import pytest
import torch

from camshaft import halving
from camshaft.claims import Claim, Plan
from camshaft.plugin import Plugin, hookimpl
from camshaft.recipe import check
from camshaft.testing.compare import assert_within, compare
from camshaft.testing.run import record_rank, record_ranks

pytestmark = pytest.mark.broad

ADAMW = {"precision": {"compute": "fp64"}, "adamw": {"lr": 3e-3}, "clip": {"max_norm": 0.5}}
BOUNDS = dict.fromkeys(("gradients", "norm", "weights", "optimizer", "loss", "lr"), 1e-12)
QUIET = {"bucket_size_mb": 0.005, "overlap": False}
OWNERS = {
    "plain": ({"ddp": None}, 1),
    "ddp": ({"ddp": QUIET}, 2),
    "recompute": ({"ddp": None, "recompute": {"mode": "full"}}, 1),
    "ddp, recompute": ({"ddp": QUIET, "recompute": {"mode": "selective"}}, 2),
    "zero 1": ({"ddp": None, "zero": {"stage": 1, **QUIET}}, 2),
    "zero 2": ({"ddp": None, "zero": {"stage": 2, "reduce": "last", **QUIET}}, 2),
}

UNDISTURBED = {}
"""Records by owner, made once."""


class Short(Plugin):
    """No room for more than ``rows`` on one rank, from one step on, at one microbatch of it, in one direction."""

    draws = False

    def __init__(self, rank, rows, step, microbatch, where):
        super().__init__()
        self.rank, self.rows, self.step, self.microbatch, self.where = rank, rows, step, microbatch, where
        self.armed, self.raised, self.parts = False, 0, []

    def fail(self, *_):
        if self.armed:
            self.raised += 1
            raise torch.OutOfMemoryError("tried to allocate 7 rows")

    @hookimpl
    def bind(self, state):
        self.state = state
        first = state.model.get_submodule("model.layers.0.mlp")
        self.handle = first.register_forward_hook(lambda module, given, made: self.watch(made))

    def watch(self, made):
        if self.where == "backward":  # of the first layer: most gradients are there by then
            made.register_hook(self.fail)
        else:
            self.fail()

    @hookimpl
    def pre_forward(self, state, batch):
        first = state.microbatch >= self.microbatch
        mine = state.world.rank == self.rank and state.step >= self.step
        self.armed = mine and first and batch.tokens.shape[0] > self.rows
        if state.step >= self.step:
            assert batch.weight == int((batch.labels >= 0).sum())

    @hookimpl
    def log(self, state, record):
        self.parts.append(record.get("memory/halvings", 0))

    @hookimpl
    def close(self, state, status):
        self.handle.remove()
        if status == "finished":
            expected = 1 if self.rows > 1 else 2
            assert self.raised == (expected if state.world.rank == self.rank else 0), self.raised
            assert self.parts == [0] * self.step + [expected] * (len(self.parts) - self.step), self.parts


@pytest.fixture
def recipe_of(make_recipe):
    def build(plugins, world_size, way, **batch):
        sections = {
            "training": {"max_steps": 3, "log_every": 1},
            "batch": {"micro_batch_size": 3, "global_batch_size": 12, "on_out_of_memory": way, **batch},
        }
        return make_recipe({**plugins, **ADAMW}, world_size, **sections)

    return build


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("owner", OWNERS)
def test_the_numbers_are_those_of_a_run_that_was_not_disturbed(recipe_of, owner, where):
    plugins, ranks = OWNERS[owner]
    if owner not in UNDISTURBED:
        UNDISTURBED[owner] = record_ranks(recipe_of(plugins, ranks, "stop"), ranks)[0]
        calm = record_ranks(recipe_of(plugins, ranks, "halve"), ranks)[0]
        assert_within(compare(calm, UNDISTURBED[owner]), dict.fromkeys(BOUNDS, 0.0))  # without need nothing changes
    reference = UNDISTURBED[owner]
    # The last microbatch of a window: its backward is the one in which owners would reduce. Then in a window's middle.
    for step, microbatch in ((0, 12 // (3 * ranks) - 1), (2, 1)):
        short = Short(ranks - 1, 2, step, microbatch, where)
        halved = record_ranks(recipe_of(plugins, ranks, "halve"), ranks, {"short": short})
        for records in halved:
            assert_within(compare(records, reference), BOUNDS)


def test_halves_that_do_not_fit_are_halved_again_down_to_one_sample(recipe_of):
    plugins, ranks = OWNERS["ddp"]
    reference = record_ranks(recipe_of(plugins, ranks, "stop"), ranks)[0]
    records = record_ranks(recipe_of(plugins, ranks, "halve"), ranks, {"short": Short(0, 1, 1, 0, "backward")})[0]
    assert_within(compare(records, reference), BOUNDS)


class Shifts(Plugin):
    """Changes each batch that it is given, in place: a second time it would be another one."""

    draws = False

    @hookimpl
    def pre_forward(self, batch):
        batch.tokens = (batch.tokens + 1) % 259


def test_what_plugins_did_to_a_batch_that_did_not_fit_is_undone(recipe_of):
    plugins, ranks = OWNERS["plain"]
    reference = record_ranks(recipe_of(plugins, ranks, "stop"), ranks, {"shifts": Shifts()})[0]
    short = {"shifts": Shifts(), "short": Short(0, 1, 1, 1, "backward")}
    records = record_ranks(recipe_of(plugins, ranks, "halve"), ranks, short)[0]
    assert_within(compare(records, reference), BOUNDS)


class Wet(Plugin):
    """Dropout behind a layer; ``draws`` is for plugins that say nothing."""

    @hookimpl
    def bind(self, state):
        layer = state.model.get_submodule("model.layers.1.mlp")
        layer.register_forward_hook(lambda module, given, made: torch.nn.functional.dropout(made, 0.2))


@pytest.mark.parametrize("wet", [False, True])
def test_where_halves_draw_other_random_numbers_the_run_says_so(recipe_of, wet, caplog):
    observers = {"short": Short(0, 2, 1, 0, "forward"), **({"wet": Wet()} if wet else {})}
    record_rank(0, 1, recipe_of(*OWNERS["plain"], "halve"), observers)
    (warning,) = [record.message for record in caplog.records if "out of memory at step 1" in record.message]
    assert warning.endswith("from here on") == (not wet)
    assert warning.endswith("random numbers of their own") == wet


@pytest.mark.parametrize(("way", "message"), [("halve", "one sample at a time"), ("stop", "tried to allocate 7 rows")])
def test_a_sample_that_does_not_fit_and_a_recipe_that_says_stop_end_the_run(recipe_of, way, message):
    with pytest.raises(Exception, match=message):
        record_ranks(recipe_of(*OWNERS["plain"], way), 1, {"short": Short(0, 0, 1, 0, "forward")})


@pytest.mark.parametrize(
    ("plugins", "parallel", "names"),
    [
        ({"ddp": {}}, {}, {"ddp": "plugins.ddp.overlap=false"}),
        ({"ddp": None, "zero": {"stage": 1}}, {}, {"zero": "plugins.zero.overlap=false"}),
        ({"ddp": None, "zero": {"stage": 2, "overlap": False}}, {}, {"zero": "=stop"}),
        ({"ddp": None, "zero": {"stage": 3, "overlap": False}}, {}, {"zero": "=stop"}),
        ({"ddp": None, "zero": {"stage": 3}}, {}, {"zero": "=stop"}),  # it gathers in a forward, overlapped or not
        ({"ddp": None, "deepspeed": {"stage": 1}}, {}, {"deepspeed": "=stop"}),
        ({"ddp": None, "tensor_parallel": {}}, {"tensor_parallel": 2}, {"tensor_parallel": "=stop"}),
        ({"ddp": None, "pipeline": {"schedule": "1f1b"}}, {"pipeline_parallel": 2}, {"pipeline": "=stop"}),
    ],
)
def test_validate_refuses_owners_that_exchange_during_a_microbatch(make_recipe, plugins, parallel, names):
    sections = {
        "parallel": parallel,
        "batch": {"micro_batch_size": 3, "global_batch_size": 12, "on_out_of_memory": "halve"},
        "model": {**make_recipe({}).tree["model"], "num_attention_heads": 6},
    }
    resolved = make_recipe({**plugins, "adamw": {"lr": 1e-3}}, 2, **sections)
    (found,) = [each for each in check(resolved, 2).problems if each.key == "batch.on_out_of_memory"]
    for name, fix in names.items():
        assert f"'{name}'" in found.message and "halve" in found.message and fix in found.fix
        assert ("overlap" in found.fix) == ("overlap" in fix), "an option that does not help is not named"


@pytest.mark.parametrize(
    ("claim", "provides", "refused"),
    [
        (Claim("parameter.layout", "dp"), (), True),  # it gathers in forwards, whoever sums the gradients
        (Claim("activation.layout", "cp"), (), True),
        (Claim("parameter.layout", "dp"), (halving.QUIET,), False),
        (Claim("parameter.layout"), (), False),
        (Claim("module.implementation", "tp"), (), False),
    ],
)
def test_who_lays_out_along_an_axis_exchanges_as_well(claim, provides, refused):
    assert bool([*halving.problems({"strange": Plan(claims=(claim,), provides=provides)}, {})]) is refused
