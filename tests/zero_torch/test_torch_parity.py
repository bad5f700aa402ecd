"""``fully_shard`` behind our slots against a plain loop: gradients, norm, weights, state and loss of 20 steps."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import references
from camshaft.data import prepare
from camshaft.plugin import Plugin, hookimpl
from camshaft.state import Policy
from camshaft.testing.compare import assert_bit_equal, assert_within, compare
from camshaft.testing.ranks import run_ranks
from camshaft.testing.reference import plain_run
from camshaft.testing.run import record_rank
from camshaft.testing.run import record_ranks as train
from references import ADAMW, EXACT, FP32, LINEAR, OPTIMIZERS, Variant, linear

pytestmark = pytest.mark.broad

BOUNDS = {"fp64": EXACT, "fp32": FP32}
MODES = [{"keep": keep, "reduce": reduce} for keep in (True, False) for reduce in ("each", "last")]
NAMES = [f"stage {2 if mode['keep'] else 3}, {mode['reduce']}" for mode in MODES]


def change(model, frozen=(), unused=False):
    references.change(model, frozen, unused)
    if unused:
        model.model.layers[0].unused = torch.nn.Parameter(torch.empty(1, 3, device="meta"))


def plugins(optimizer, compute, mode):
    return {
        "ddp": None,
        "torch_zero": mode,
        **optimizer,
        **LINEAR,
        "clip": {"max_norm": 0.1},
        "precision": {"compute": compute},
    }


def reference(make_recipe, optimizer, compute, sections=None, **changes):
    settings, build = OPTIMIZERS[optimizer]
    resolved = make_recipe({**plugins(settings, compute, {}), "torch_zero": None}, **(sections or {}))
    records = plain_run(
        resolved,
        prepare(resolved),
        build,
        compute=compute,
        max_norm=0.1,
        factor=linear,
        prepare=lambda model: change(model, **changes),
    )
    assert all(record.norm > 0.1 for record in records), "clipping must be active in every step"
    return records


def assert_parity(ranks, wanted, bounds):
    assert_within(compare(ranks[0], wanted), bounds)
    for other in ranks[1:]:
        assert_bit_equal(ranks[0], other)


SHORT = {"training": {"max_steps": 6, "log_every": 1}}
"""Where the shape of the model is what is tried, not the length of the run."""


@pytest.mark.parametrize(
    ("optimizer", "compute", "modes"),
    [("adamw", "fp64", MODES), ("sgd", "fp64", MODES[:1]), ("sgd", "fp32", MODES[2:3]), ("adamw", "fp32", MODES[-1:])],
    ids=["adamw-fp64", "sgd-fp64", "sgd-fp32", "adamw-fp32"],
)
def test_two_ranks_equal_one_process(make_recipe, optimizer, compute, modes):
    """Uneven tokens, tied embeddings, sizes that no number of ranks divides, accumulation 3, a short last window."""
    wanted = reference(make_recipe, optimizer, compute)
    assert len(wanted) == 20
    settings = OPTIMIZERS[optimizer][0]
    for mode in modes:
        assert_parity(train(make_recipe(plugins(settings, compute, mode), 2), 2), wanted, BOUNDS[compute])


@pytest.mark.parametrize("mode", MODES[1:3], ids=NAMES[1:3])
def test_hybrid_sharding_equals_one_process(make_recipe, mode):
    wanted = reference(make_recipe, "adamw", "fp64", SHORT)
    resolved = make_recipe(plugins(ADAMW, "fp64", mode), 4, parallel={"data_parallel_shard": 2}, **SHORT)
    assert_parity(train(resolved, 4), wanted, BOUNDS["fp64"])


def test_ranks_that_hold_nothing_of_a_parameter(make_recipe):
    """An unused parameter of one row on four ranks, beside projections of 6 rows: shards of 2, 2, 2 and 0."""
    wanted = reference(make_recipe, "adamw", "fp64", SHORT, unused=True)
    resolved = make_recipe(plugins(ADAMW, "fp64", MODES[-1]), 4, **SHORT)
    assert_parity(train(resolved, 4, {"variant": Variant(change, unused=True)}), wanted, BOUNDS["fp64"])


@pytest.mark.parametrize("reduce", ["each", "last"])
def test_zero_hands_its_third_stage_to_fully_shard(make_recipe, reduce):
    wanted = reference(make_recipe, "adamw", "fp64", SHORT)
    chosen = {**plugins(ADAMW, "fp64", None), "zero": {"stage": 3, "provider": "torch", "reduce": reduce}}
    assert_parity(train(make_recipe(chosen, 2, **SHORT), 2), wanted, BOUNDS["fp64"])


@pytest.mark.parametrize(
    "changes",
    [
        {"frozen": ("layers.1.", "norm"), "unused": False},
        {"frozen": ("embed_tokens",), "unused": True},
        {"frozen": ("embed_tokens", "layers.0.", "layers.1."), "unused": False},
    ],
    ids=["frozen-layer-and-norms", "frozen-tied-and-unused", "frozen-bottom"],
)
def test_frozen_tied_and_unused_parameters(make_recipe, changes):
    wanted = reference(make_recipe, "adamw", "fp64", SHORT, **changes)
    for mode in MODES[1:3]:
        ranks = train(make_recipe(plugins(ADAMW, "fp64", mode), 2, **SHORT), 2, {"variant": Variant(change, **changes)})
        assert_parity(ranks, wanted, BOUNDS["fp64"])
    for name, value in wanted[0].weights.items():
        if any(part in name for part in changes["frozen"]) or name.endswith("unused"):
            assert torch.equal(value, ranks[0][-1].weights[name]), f"{name} moved"


class AfterEvaluation(Plugin):
    """Looks at the model's parameters when an evaluation has ended."""

    @hookimpl
    def post_step(self):
        self.steps = getattr(self, "steps", 0) + 1

    @hookimpl
    def log(self, state, record):
        if any(key.startswith("eval/") for key in record):
            assert all(isinstance(parameter, DTensor) for parameter in state.model.parameters())
            self.evaluations = getattr(self, "evaluations", 0) + 1

    @hookimpl
    def close(self, status):
        assert status == "failed" or (self.steps, self.evaluations) == (6, 1 + 3), "before the first step, at 2, 4, 6"


def test_evaluation_between_steps_changes_nothing(make_recipe):
    """No backward frees what evaluation gathers: it is freed, or whole copies would stay and be read for shards."""
    settings = {"training": {"max_steps": 6, "log_every": 1, "eval_every": 2}}
    base = make_recipe(plugins(ADAMW, "fp64", {}), 1)
    settings["data"] = base.tree["data"] | {"validation_fraction": 0.1}
    wanted = reference(make_recipe, "adamw", "fp64", settings)
    for mode in MODES[1:3]:
        ranks = train(make_recipe(plugins(ADAMW, "fp64", mode), 2, **settings), 2, {"after": AfterEvaluation()})
        assert_parity(ranks, wanted, BOUNDS["fp64"])


def test_bf16_autocast_stays_within_its_stated_bound(make_recipe):
    wanted = reference(make_recipe, "adamw", "bf16")
    ranks = train(make_recipe(plugins(ADAMW, "bf16", MODES[-1]), 2), 2)
    # The bounds for bf16 autocast of the other rows of the family.
    assert_parity(ranks, wanted, {"loss": 1e-3, "norm": 5e-3, "weights": 1e-2})
    assert all(tensor.dtype == torch.float32 for tensor in ranks[0][-1].weights.values()), "masters are fp32"


class Narrow(Plugin):
    """Owns ``precision``: bf16 parameters, fp32 masters and sums."""

    @hookimpl
    def precision(self, world):
        return Policy(torch.bfloat16, torch.bfloat16, torch.float32, torch.float32)


@pytest.mark.parametrize("mode", MODES[1:3], ids=NAMES[1:3])
def test_bf16_parameters_have_fp32_masters(make_recipe, mode):
    """Against the core's own masters in one process: the same rounded parameters, gradients rounded a rank earlier."""
    chosen = {**plugins(ADAMW, "fp32", mode), "precision": None}
    observers = {"narrow": Narrow()}
    alone = make_recipe({**chosen, "torch_zero": None}, 1, **SHORT)
    (wanted,) = train(alone, 1, observers)
    ranks = train(make_recipe(chosen, 2, **SHORT), 2, observers)
    assert_parity(ranks, wanted, {"loss": 1e-3, "norm": 5e-3, "weights": 1e-2})
    for record in ranks[0]:
        assert all(tensor.dtype == torch.float32 for tensor in [*record.weights.values(), *record.gradients.values()])


class Collectives(Plugin):
    """Counts the collectives of each window, where ``fully_shard`` looks them up."""

    def __init__(self):
        super().__init__()
        self.counts = []

    @hookimpl
    def pre_run(self):
        self.calls, self.inside = Counter(), False
        for name in [name for name in dir(dist) if name.startswith(("all_gather", "reduce_scatter"))]:
            setattr(dist, name, self.counting(name.split("_")[1], getattr(dist, name)))

    def counting(self, kind, function):
        def call(*arguments, **keywords):
            if self.inside:  # one name of the function calls the other
                return function(*arguments, **keywords)
            self.calls[kind] += 1
            self.inside = True
            try:
                return function(*arguments, **keywords)
            finally:
                self.inside = False

        return call

    @hookimpl
    def pre_forward(self, state):
        if state.microbatch == 0:
            self.calls.clear()

    @hookimpl
    def post_reduce(self):
        self.counts.append((self.calls["gather"], self.calls["scatter"]))


def counted(rank, world_size, resolved):
    seen = Collectives()
    record_rank(rank, world_size, resolved, {"seen": seen})
    return seen.counts


@pytest.mark.parametrize("mode", MODES, ids=NAMES)
def test_a_window_gathers_and_reduces_as_often_as_its_mode_says(make_recipe, mode):
    resolved = make_recipe(plugins(ADAMW, "fp32", mode), 2, training={"max_steps": 5, "log_every": 1})
    units, microbatches = 3 + 1, 3
    gathers = units if mode["keep"] else microbatches * (units + units - 1)  # the root's stay until backward is over
    reductions = units * (microbatches if mode["reduce"] == "each" else 1)
    for counts in run_ranks(2, counted, resolved):
        assert counts == [(gathers, reductions)] * 5
