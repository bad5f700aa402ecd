"""A user's own models with plans from the recipe, dropout, frozen parameters, long runs: as one process has them."""

from collections import Counter

import pytest
import torch
from tensor_cases import FP64, check, recipe, reference, train
from tensor_models import PLAN, Builds, freeze

from camshaft.distributed import Environment
from camshaft.loop import session
from camshaft.models.llama import Llama
from camshaft.plugin import Plugin, hookimpl
from camshaft.rundir import RunDirectory
from camshaft.testing.compare import assert_bit_equal, assert_within, compare
from camshaft.testing.ranks import run_ranks
from camshaft.testing.run import Quiet

pytestmark = pytest.mark.broad


@pytest.mark.parametrize("tensor", [{}, {"sequence_parallel": True}, {"sequence_parallel": True, "async": True}])
def test_a_model_of_ones_own_with_dropout(make_recipe, tensor):
    """Against one rank of the engine, whose dropout draws from the same seed of each step."""
    builds = {"builds": Builds()}
    wanted = train(make_recipe, 1, builds)[0]
    ranks = train(make_recipe, 2, builds, tensor={**tensor, "plan": PLAN})
    check(ranks, wanted)


def test_the_dropout_does_something(make_recipe, monkeypatch):
    """The comparison above would not see a dropout that is off on both sides."""
    wanted = train(make_recipe, 1, {"builds": Builds()})[0]
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda self, hidden: hidden)
    assert compare(train(make_recipe, 1, {"builds": Builds()})[0], wanted)["loss"][0] > 1e-4


@pytest.mark.parametrize(
    ("frozen", "sequence"), [(("layers.0.", "norm"), False), (("layers.0.", "norm"), True), (("embed_tokens",), True)]
)
def test_frozen_parameters(make_recipe, frozen, sequence):
    wanted = reference(make_recipe, prepare_model=lambda model: freeze(model, frozen), num_key_value_heads=1)
    builds = {"builds": Builds(Llama, frozen)}
    ranks = train(make_recipe, 2, builds, tensor={"sequence_parallel": sequence}, num_key_value_heads=1)
    check(ranks, wanted)
    for name, weight in wanted[0].weights.items():
        if any(part in name for part in frozen):
            assert torch.equal(ranks[0][-1].weights[name], weight), f"{name} moved"


def test_a_recipe_overrides_the_models_plan(make_recipe):
    """One layer's MLP stays whole on every rank."""
    wanted = reference(make_recipe)
    plan = {f"model.layers.0.mlp{part}": "outer" for part in ("", ".gate_proj", ".up_proj", ".down_proj")}
    check(train(make_recipe, 2, tensor={"sequence_parallel": True, "plan": plan}), wanted)


class Copies(Plugin):
    """Keeps what every rank has when the run ends."""

    @hookimpl
    def bind(self, state):
        self.state = state

    @hookimpl
    def close(self, status):
        assert status == "finished"
        self.weights = {name: parameter.detach().clone() for name, parameter in self.state.model.named_parameters()}
        self.boxes = dict(self.state.world.boxes)


def left_over(rank, world_size, resolved):
    copies = Copies()
    environment = Environment(rank, rank, world_size, world_size, "torchrun")
    with session(resolved, environment, RunDirectory(resolved.recipe.run.dir), {"copies": copies}) as trainer:
        trainer.train(Quiet(), Quiet())
    return copies.state.step, copies.weights, copies.boxes


def test_copies_are_bit_equal_after_50_steps(make_recipe):
    tree = recipe(make_recipe, 4, tensor={"sequence_parallel": True}, compute="fp32", qk_norm=True).tree
    resolved = make_recipe(
        dict(tree["plugins"]), 4, model=tree["model"], batch=tree["batch"], parallel=tree["parallel"],
        training={"max_steps": 50, "log_every": 10},
    )  # fmt: skip
    ranks = run_ranks(4, left_over, resolved, timeout_s=100)
    held = [(name, box, weights[name]) for _, weights, boxes in ranks for name, box in boxes.items()]
    assert {steps for steps, *_ in ranks} == {50}
    numbers = Counter((name, box) for name, box, _ in held)
    assert all(count == box.copies for (_, box), count in numbers.items())
    assert {box.copies for _, box in numbers} == {1, 2, 4}, "divided, shared by two, and on every rank"
    first = {}
    for name, box, weight in held:
        assert torch.equal(first.setdefault((name, box), weight), weight), name


# Measured, rounded up once: gradients of fp32 2e-6, of bf16 autocast 2e-2 (a parameter whose gradient nearly cancels).
NARROW = {
    "fp32": {"gradients": 1e-4, "norm": 2e-6, "weights": 1e-5, "loss": 2e-6},
    "bf16": {"loss": 1e-3, "norm": 5e-3, "weights": 1e-2},
}


@pytest.mark.parametrize(("compute", "sequence"), [("fp32", False), ("bf16", True)])
def test_narrow_dtypes_stay_within_their_bounds(make_recipe, compute, sequence):
    wanted = reference(make_recipe, compute=compute)
    ranks = train(make_recipe, 2, tensor={"sequence_parallel": sequence}, compute=compute)
    worst = compare(ranks[0], wanted)
    assert_within(worst, NARROW[compute])
    assert worst["gradients"][0] > FP64["gradients"], "not computed in fp64"
    assert_bit_equal(ranks[0], ranks[1])
