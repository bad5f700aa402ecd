"""Debug contracts: who writes what it did not claim is named with hook and tensor, and copies are compared."""

import pytest
import torch

from camshaft.contracts import weighted
from camshaft.distributed import Environment
from camshaft.errors import PluginError
from camshaft.loop import session
from camshaft.plugin import Plugin, hookimpl
from camshaft.rundir import RunDirectory
from camshaft.testing.ranks import run_ranks
from camshaft.testing.run import Quiet

SGD = {"ddp": None, "sgd": {"lr": 0.05, "momentum": 0.9}, "clip": {"max_norm": 0.1}, "precision": {"compute": "fp32"}}
NORM = "model.norm.weight"


@torch.no_grad()
def nudge(tensor):
    tensor.view(-1)[0] += 1.0


class Writes(Plugin):
    """Writes ``what`` in ``hook``, in the second step."""

    def __init__(self, what):
        super().__init__()
        self.what, self.state = what, None

    @hookimpl
    def bind(self, state):
        self.state = state

    def write(self):
        state = self.state
        parameter = state.model.get_parameter(NORM)
        holds = (part for part in state.world.parts if any(piece.name == NORM for piece in part.pieces))
        part = next(holds, None)  # another rank may hold it
        match self.what:
            case "weight":
                nudge(part.tensor)
            case "parameter":
                nudge(parameter)
            case "data":
                nudge(part.tensor.data)
            case "gradient":
                nudge(part.tensor.grad if part.tensor.grad is not None else parameter.grad)
            case "no gradient":
                part.tensor.grad = None
            case "value":
                nudge(state.optimizer.state[part.tensor]["momentum_buffer"])
            case "buffer":
                nudge(state.model.get_buffer("extra"))

    def now(self, step=1):
        if self.state.step == step:
            self.write()


class PreForward(Writes):
    @hookimpl
    def pre_forward(self):
        self.now()


class AroundForward(Writes):
    @hookimpl
    def around_forward(self, state, call):
        def forward(batch):
            made = call(batch)
            self.now()
            return made

        return forward


class PostBackward(Writes):
    @hookimpl
    def post_backward(self):
        self.now()


class Reduce(Writes):
    @hookimpl
    def reduce(self):
        self.now()


class ReduceParts(Writes):
    @hookimpl
    def reduce_parts(self):
        self.now()


class PostReduce(Writes):
    @hookimpl
    def post_reduce(self):
        self.now()


class BeforeStep(Writes):
    @hookimpl
    def around_step(self, state, call):
        def step():
            self.now()
            call()

        return step


class AfterStep(Writes):
    @hookimpl
    def around_step(self, state, call):
        def step():
            call()
            self.now()

        return step


class PostStep(Writes):
    @hookimpl
    def post_step(self):
        self.now(step=2)


class Log(Writes):
    @hookimpl
    def log(self):
        self.now(step=2)


class Innocent(Plugin):
    """Looks, and writes nothing."""

    @hookimpl
    def post_step(self, state):
        self.seen = float(state.loss)


def rank(rank, world_size, resolved, observers, prepare=None):
    """Train; returns (plugin, hook, message) of what was raised, or None."""
    environment = Environment(rank, rank, world_size, world_size, "torchrun" if world_size > 1 else "none")
    try:
        with session(resolved, environment, RunDirectory(resolved.recipe.run.dir), observers) as trainer:
            trainer.state.model.register_buffer("extra", torch.zeros(3))
            if prepare is not None:
                prepare(trainer.state)
            trainer.train(Quiet(), Quiet())
    except PluginError as error:
        return error.plugin, error.hook, str(error)
    return None


def train(make_recipe, observers, plugins=SGD, ranks=1, *, on=True, steps=3, prepare=None, **sections):
    training = {"max_steps": steps, "log_every": 1}
    debug = {"contracts": on}
    resolved = make_recipe(plugins, ranks, training=training, debug=debug, **sections)
    return run_ranks(ranks, rank, resolved, observers, prepare, timeout_s=60)


BROKEN = [
    (PreForward, "weight", "pre_forward"),
    (PreForward, "buffer", "pre_forward"),
    (AroundForward, "weight", "around_forward"),
    (AroundForward, "value", "around_forward"),
    (PostBackward, "gradient", "post_backward"),
    (PostBackward, "data", "post_backward"),
    (Reduce, "gradient", "reduce"),
    (ReduceParts, "gradient", "reduce_parts"),
    (PostReduce, "weight", "post_reduce"),
    (PostReduce, "value", "post_reduce"),
    (BeforeStep, "gradient", "around_step"),
    (BeforeStep, "no gradient", "around_step"),
    (AfterStep, "weight", "around_step"),
    (AfterStep, "data", "around_step"),
    (PostStep, "weight", "post_step"),
    (PostStep, "value", "post_step"),
    (Log, "weight", "log"),
    (Log, "buffer", "log"),
]
NAMED = {"weight": NORM, "data": NORM, "gradient": NORM, "no gradient": NORM, "value": f"{NORM}/momentum_buffer"}


@pytest.mark.parametrize(("kind", "what", "hook"), BROKEN, ids=lambda value: getattr(value, "__name__", value))
def test_a_write_without_a_claim_is_named_within_the_step(make_recipe, kind, what, hook):
    ((plugin, where, message),) = train(make_recipe, {"innocent": Innocent(), "writer": kind(what)})
    assert (plugin, where) == ("writer", hook), message
    assert f"'{NAMED.get(what, 'extra')}" in message and "in step 2" in message, message


@pytest.mark.parametrize("kind", [PostReduce], ids=lambda kind: kind.__name__)
def test_gradients_may_be_changed_when_they_are_final(make_recipe, kind):
    assert train(make_recipe, {"writer": kind("gradient")}) == [None]


def test_without_it_nothing_is_wrapped_and_nothing_said(make_recipe, monkeypatch):
    monkeypatch.delattr("camshaft.contracts.Contracts")
    assert train(make_recipe, {"writer": PostStep("weight")}, on=False) == [None]


ADAMW = {"adamw": {"lr": 3e-3}, "clip": {"max_norm": 0.1}, "precision": {"compute": "fp32"}}
STORAGE = {
    "ddp": {},
    "zero 1": {"ddp": None, "zero": {"stage": 1, "bucket_size_mb": 0.01}},
    "zero 2": {"ddp": None, "zero": {"stage": 2, "bucket_size_mb": 0.01}},
    "zero 3": {"ddp": None, "zero": {"stage": 3}},
    "narrow": {"precision": {"compute": "bf16", "parameters": "bf16"}},
}


@pytest.mark.parametrize("name", STORAGE)
def test_shipped_storage_keeps_to_what_it_claimed(make_recipe, name):
    assert train(make_recipe, {}, ADAMW | STORAGE[name], 2) == [None, None]


@pytest.mark.parametrize("name", ["zero 1", "zero 2"])
def test_a_write_beside_what_is_divided_is_named(make_recipe, name):
    for found in train(make_recipe, {"writer": PostReduce("parameter")}, ADAMW | STORAGE[name], 2):
        plugin, hook, message = found
        assert (plugin, hook) == ("writer", "post_reduce") and f"'{NORM}" in message, message


def outside_of_hooks(state):
    """What no hook does: one rank's copy is nudged where its module runs."""
    if state.world.rank == 1:
        norm = state.model.model.norm
        norm.register_forward_pre_hook(lambda *_: nudge(norm.weight.data) if state.step == 1 else None)


def test_copies_that_part_are_named_with_parameter_and_ranks(make_recipe):
    steps = 16
    model = make_recipe(ADAMW).tree["model"] | {"num_hidden_layers": 1}
    found = train(make_recipe, {}, ADAMW, 2, steps=steps, prepare=outside_of_hooks, model=model)
    for plugin, _, message in found:
        assert plugin == "ddp" and "ranks 0 and 1 hold other values of 'model" in message, message


def always_outside_of_hooks(state):
    """The same in every step from the second on: what is divided is sent anew after each."""
    if state.world.rank == 1:
        norm = state.model.model.norm
        norm.register_forward_pre_hook(lambda *_: nudge(norm.weight.data) if state.step >= 1 else None)


@pytest.mark.parametrize("name", ["zero 1", "zero 2"])
def test_copies_of_what_ranks_update_apart_are_compared_too(make_recipe, name):
    """Each rank updates other parameters, and all of them hold a copy of each."""
    model = make_recipe(ADAMW).tree["model"] | {"num_hidden_layers": 1}
    plugins = ADAMW | STORAGE[name]
    for found in train(make_recipe, {}, plugins, 2, steps=16, prepare=always_outside_of_hooks, model=model):
        assert found is not None, "nothing was seen"
        assert found[0] == "zero" and f"ranks 0 and 1 hold other values of '{NORM}'" in found[2], found


def test_a_checksum_of_a_device_counts_every_byte():
    values = torch.zeros(70_000, dtype=torch.uint8)
    before = weighted(values)
    values[65_520] = 1
    assert weighted(values) != before


def spoil_the_tied_copy(state):
    head = getattr(state.model, "lm_head", None)
    if head is not None:
        head.register_forward_pre_hook(lambda *_: nudge(head.weight) if state.step == 1 else None)


def test_a_tied_copy_of_another_stage_is_compared_each_step(make_recipe):
    plugins = {**ADAMW, "ddp": None, "pipeline": {"schedule": "1f1b"}}
    sections = {"parallel": {"pipeline_parallel": 2}, "batch": {"micro_batch_size": 4, "global_batch_size": 12}}
    assert train(make_recipe, {}, plugins, 2, **sections) == [None, None]
    for plugin, _, message in train(make_recipe, {}, plugins, 2, prepare=spoil_the_tied_copy, **sections):
        assert plugin == "pipeline" and "'model.embed_tokens.weight (tied)' in step 2" in message, message
