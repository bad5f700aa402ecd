"""The step: no pluggy call inside, every hook called when it says, defaults replaced by owners, faults stopped."""

import collections
from types import SimpleNamespace

import pytest
import torch
from run_stand_ins import Asked, Raises

from camshaft.claims import Claim, Plan
from camshaft.distributed import Environment
from camshaft.errors import Interrupted, NonFiniteLoss, PluginError
from camshaft.loop import run, session
from camshaft.models.llama import Llama
from camshaft.plugin import Plugin, hookimpl
from camshaft.program import Action, Kind
from camshaft.rundir import RunDirectory
from camshaft.testing.ranks import RankFailed, run_ranks
from camshaft.testing.run import Quiet, record_ranks

SETTINGS = {"sgd": {"lr": 0.1}, "clip": {"max_norm": 1.0}, "precision": {"compute": "fp32"}}
ALONE = Environment()


def trained(resolved, *observers, steps=None, stop=None):
    """Train in this process with plugins beside the recipe's; returns the trainer."""
    named = {f"observer{index}": observer for index, observer in enumerate(observers)}
    with session(resolved, ALONE, RunDirectory(resolved.recipe.run.dir), named) as trainer:
        trainer.train(Quiet(), stop or Quiet())
    return trainer


class Journal(Plugin):
    """Writes down every hook of step and run."""

    def __init__(self):
        super().__init__()
        self.lines = []

    @hookimpl
    def pre_run(self, state):
        self.lines.append("pre_run")

    @hookimpl
    def pre_forward(self, state, batch):
        self.lines.append(f"pre_forward{state.microbatch}")
        assert batch is state.window.batches[state.microbatch]

    @hookimpl
    def around_forward(self, state, call):
        def forward(batch):
            self.lines.append("forward")
            return call(batch)

        return forward

    @hookimpl
    def post_backward(self, state):
        self.lines.append(f"post_backward{state.microbatch}{'!' if state.final_backward else ''}")

    @hookimpl
    def reduce(self, state):
        self.lines.append("reduce")

    @hookimpl
    def around_step(self, state, call):
        def step():
            self.lines.append("step")
            call()

        return step

    @hookimpl
    def post_step(self, state):
        self.lines.append(f"post_step{state.step}")
        assert all(parameter.grad is None for parameter in state.model.parameters()), "gradients are released"

    @hookimpl
    def log(self, state, record):
        self.lines.append("log" if "train/loss" in record else "eval")

    @hookimpl
    def close(self, state, status):
        self.lines.append(f"close {status}")


def test_hooks_run_in_the_documented_order(make_recipe):
    journal = Journal()
    resolved = make_recipe(SETTINGS, accumulation=2, training={"max_steps": 2, "log_every": 1})
    trained(resolved, journal)
    window = [
        "pre_forward0",
        "forward",
        "post_backward0",
        "pre_forward1",
        "forward",
        "post_backward1!",
        "reduce",
        "step",
    ]
    assert journal.lines == [
        "pre_run",
        *window,
        "log",
        "post_step1",
        *window,
        "log",
        "post_step2",
        "close finished",
    ]


def test_no_pluggy_call_happens_inside_a_step(make_recipe):
    resolved = make_recipe(SETTINGS, training={"max_steps": 4, "log_every": 2})
    calls = collections.Counter()
    with session(resolved, ALONE, RunDirectory(resolved.recipe.run.dir), {"journal": Journal()}) as trainer:
        undo = trainer.host.manager.add_hookcall_monitoring(
            before=lambda name, implementations, arguments: calls.update([name]),
            after=lambda outcome, name, implementations, arguments: None,
        )
        trainer.host.manager.hook.post_step(state=trainer.state)
        assert calls == {"post_step": 1}, "the monitor sees pluggy calls"
        trainer.train(Quiet(), Quiet())
        undo()
    assert calls == {"post_step": 1}


class Owns(Plugin):
    """Owns slots of the step that the core has defaults for."""

    def __init__(self):
        super().__init__()
        self.seen = collections.Counter()

    @hookimpl
    def schedule(self, mesh, rank, microbatches):
        forwards = [Action(Kind.F, index) for index in range(microbatches)]
        backwards = [Action(Kind.B, index) for index in reversed(range(microbatches))]
        return (*forwards, *backwards, Action(Kind.REDUCE), Action(Kind.CLIP), Action(Kind.STEP))

    @hookimpl
    def step(self, state):
        self.seen["step"] += 1
        state.optimizer.step()

    @hookimpl
    def post_backward(self, state):
        self.seen[f"final{state.microbatch}"] += state.final_backward


def test_owners_replace_the_defaults_and_a_schedule_is_only_data(make_recipe):
    settings = {**SETTINGS, "precision": {"compute": "fp64"}}
    resolved = make_recipe(settings, accumulation=3, training={"max_steps": 3, "log_every": 1})
    owner = Owns()
    owned = record_ranks(resolved, 1, {"owner": owner})[0]
    plain = record_ranks(resolved, 1)[0]
    for one, other in zip(owned, plain, strict=True):
        for name, weight in one.weights.items():
            torch.testing.assert_close(weight, other.weights[name], rtol=1e-12, atol=1e-14)
    local = Owns()
    trained(resolved, local)
    assert local.seen["step"] == 3 and local.seen["final0"] == 3 and local.seen["final2"] == 0


class Renames(Plugin):
    @hookimpl
    def recompute(self, world, model):
        model.extra = torch.nn.Parameter(torch.empty(2, device="meta"))


class LaysOut(Plugin):
    @hookimpl
    def shard_storage(self, world, model):
        model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight.detach().double())


class Freezes(Plugin):
    @hookimpl
    def bind(self, state):
        state.model.model.norm.weight.requires_grad_(False)


class Forgets(Plugin):
    @hookimpl
    def state_dict(self, state):
        return {}


class WrongModel(Plugin):
    @hookimpl
    def build_model(self, world, config):
        return "a model"


class Takes(Plugin):
    @hookimpl
    def handlers(self, state):
        return {Kind.F: lambda action: None}


class Unhandled(Plugin):
    @hookimpl
    def schedule(self, mesh, rank, microbatches):
        from camshaft.program import accumulate

        return (Action(Kind.SEND_F, 0), *accumulate(microbatches))


@pytest.mark.parametrize(
    ("plugin", "words"),
    [
        (Renames(), "hook 'recompute': parameter names changed: .*new .'extra'"),
        (LaysOut(), "hook 'shard_storage': laid out 'model.norm.weight' anew .* without a claim"),
        (Freezes(), "hook 'bind': laid out 'model.norm.weight' anew"),
        (Forgets(), "hook 'state_dict': saves state, but has no load_state_dict"),
        (WrongModel(), "hook 'build_model': must return a Module, got str"),
        (Takes(), "hook 'handlers': action F already belongs to 'core'"),
        (Unhandled(), "the program has actions that nobody runs: SEND_F"),
    ],
)
def test_a_plugin_that_breaks_the_contract_is_named(make_recipe, plugin, words):
    resolved = make_recipe(SETTINGS, training={"max_steps": 1, "log_every": 1})
    with pytest.raises(PluginError, match=words):
        trained(resolved, plugin)


def test_a_claimed_layout_may_change():
    from camshaft.build import _check_layouts, layouts

    model = torch.nn.Linear(3, 3)
    before = layouts(model)
    model.weight = torch.nn.Parameter(model.weight.detach().double())
    _check_layouts("p", "shard_storage", before, layouts(model), Plan(claims=(Claim("parameter.layout", "dp", "w*"),)))
    with pytest.raises(PluginError, match="laid out 'weight' anew"):
        _check_layouts("p", "shard_storage", before, layouts(model), Plan(claims=(Claim("gradient.layout", "dp"),)))


def test_a_rank_tells_what_it_is_about_to_do(make_recipe):
    resolved = make_recipe(SETTINGS, accumulation=2, training={"max_steps": 1, "log_every": 1})
    beats = []
    heartbeat = SimpleNamespace(beat=lambda step, phase: beats.append((step, phase)))
    with session(resolved, ALONE, RunDirectory(resolved.recipe.run.dir)) as trainer:
        trainer.train(heartbeat, Quiet())
    window = ["step", "forward", "backward", "forward", "backward", "reduce", "clip", "optimizer"]
    assert beats == [(0, "data"), *((0, phase) for phase in window), (1, "log"), (1, "step"), (1, "save")]
    from camshaft.cli.launch.heartbeat import PHASES

    assert {phase for _, phase in beats} <= set(PHASES), "the heartbeat knows every name"


class Poisons(Plugin):
    @hookimpl
    def pre_forward(self, state):
        if state.step == 2:
            with torch.no_grad():
                state.model.model.norm.weight[0] = float("nan")


def test_a_non_finite_loss_ends_the_run_and_says_when(make_recipe):
    resolved = make_recipe(SETTINGS, training={"max_steps": 9, "log_every": 2})
    with pytest.raises(NonFiniteLoss, match="train/loss is nan at step 4") as caught:
        trained(resolved, Poisons())
    assert caught.value.exit_status == 5


def test_a_stop_ends_after_the_step_with_a_checkpoint_or_says_that_there_is_none(make_recipe):
    resolved = make_recipe(SETTINGS, training={"max_steps": 9, "log_every": 5})
    journal = Journal()
    with pytest.raises(Interrupted, match="asked to stop after step 1; no checkpoint plugin is enabled"):
        trained(resolved, journal, stop=Asked())
    assert journal.lines[-1] == "close interrupted"


class RankOneAsks:
    def __init__(self, rank):
        self.requested = int(rank == 1)


def stop_on_rank_one(rank, world_size, resolved):
    environment = Environment(rank, rank, world_size, world_size, "torchrun")
    with session(resolved, environment, RunDirectory(resolved.recipe.run.dir)) as trainer:
        try:
            trainer.train(Quiet(), RankOneAsks(rank))
        except Interrupted:
            return trainer.state.step
    return None


def test_a_stop_in_the_last_step_is_a_finished_run(make_recipe):
    resolved = make_recipe(SETTINGS, training={"max_steps": 1, "log_every": 5})
    journal = Journal()
    trained(resolved, journal, stop=Asked())
    assert journal.lines[-1] == "close finished" and "log" in journal.lines


def test_all_ranks_stop_in_the_same_step_when_one_is_asked(make_recipe):
    resolved = make_recipe(SETTINGS, 2, training={"max_steps": 9, "log_every": 5})
    assert run_ranks(2, stop_on_rank_one, resolved) == [1, 1]


def raise_on_rank_one(rank, world_size, resolved):
    environment = Environment(rank, rank, world_size, world_size, "torchrun")
    observers = {"broken": Raises(ValueError("only here"))} if rank == 1 else {}
    with session(resolved, environment, RunDirectory(resolved.recipe.run.dir), observers) as trainer:
        trainer.train(Quiet(), Quiet())


def test_an_error_on_one_rank_does_not_leave_the_others_waiting(make_recipe):
    resolved = make_recipe(SETTINGS, 2, training={"max_steps": 9, "log_every": 5})
    with pytest.raises(RankFailed, match="plugin 'broken', hook 'pre_forward': ValueError: only here"):
        run_ranks(2, raise_on_rank_one, resolved, timeout_s=20)


def test_run_returns_zero_and_calls_the_closing_on_the_main_rank(make_recipe):
    resolved = make_recipe(SETTINGS, training={"max_steps": 1, "log_every": 1})
    shown = []
    status = run(
        resolved, ALONE, RunDirectory(resolved.recipe.run.dir), Quiet(), Quiet(), lambda *given: shown.append(given)
    )
    assert status == 0 and len(shown) == 1 and isinstance(shown[0][0].model, Llama)


def draws(rank, world_size, resolved):
    environment = Environment(rank, rank, world_size, world_size, "torchrun" if world_size > 1 else "none")
    seen = []

    class Draws(Plugin):
        @hookimpl
        def pre_forward(self):
            seen.append(float(torch.rand(())))

    with session(resolved, environment, RunDirectory(resolved.recipe.run.dir), {"draws": Draws()}) as trainer:
        trainer.train(Quiet(), Quiet())
    return seen


def test_random_numbers_differ_by_step_and_rank_and_repeat_by_run(make_recipe):
    resolved = make_recipe(SETTINGS, 2, accumulation=2, training={"max_steps": 2, "log_every": 1})
    first, second = run_ranks(2, draws, resolved)
    assert len(set(first) | set(second)) == 8
    assert run_ranks(2, draws, resolved) == [first, second]


class TrainsTheNormOnly(Plugin):
    """Takes parameters that get gradients out of the optimizer's groups."""

    @hookimpl
    def bind(self, state):
        first, *rest = state.optimizer.param_groups
        first["params"] = [state.model.model.norm.weight]
        for group in rest:
            group["params"] = []


@pytest.mark.parametrize("ddp", [{"ddp": None}, {"ddp": {}}], ids=["no-ddp", "ddp"])
def test_gradients_outside_the_optimizer_do_not_pile_up(make_recipe, ddp):
    settings = {"sgd": {"lr": 0.1}, "clip": {"max_norm": 1e9}, "precision": {"compute": "fp64"}}
    sections, observers = {"training": {"max_steps": 3, "log_every": 1}}, {"some": TrainsTheNormOnly()}
    alone = record_ranks(make_recipe({**settings, **ddp}, **sections), 1, observers)[0]
    both = record_ranks(make_recipe(settings, 2, accumulation=1, **sections), 2, observers)[0]
    for one, other in zip(alone, both, strict=True):
        assert one.norm == pytest.approx(other.norm, rel=1e-10)
        for name, gradient in one.gradients.items():
            torch.testing.assert_close(gradient, other.gradients[name], rtol=1e-8, atol=1e-12)
    assert not torch.equal(alone[0].weights["model.norm.weight"], alone[2].weights["model.norm.weight"])
