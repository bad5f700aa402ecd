"""Every enabled plugin must have had an effect when the first step ends, or the run says which had none, and stops."""

from __future__ import annotations

import pytest

from camshaft import Plan, effects
from camshaft.distributed import Environment
from camshaft.errors import PluginError, RecipeError
from camshaft.loop import session
from camshaft.models.llama import Llama
from camshaft.ops import Kernel, swiglu
from camshaft.plugin import Plugin, hookimpl
from camshaft.program import Action, Kind, accumulate
from camshaft.recipe import check
from camshaft.rundir import RunDirectory
from camshaft.testing.ranks import run_ranks
from camshaft.testing.run import Quiet, record_ranks

SGD = {"sgd": {"lr": 0.1}}
THREE_STEPS = {"training": {"max_steps": 3, "log_every": 1}}


class Nothing(Plugin):
    """A stranger's plugin that forgot its hooks."""


class OnlyTells(Plugin):
    @hookimpl
    def plan(self):
        return Plan()

    @hookimpl
    def close(self): ...


class Observer(Plugin):
    """Its effect comes with the first record, which every run that ends has."""

    @hookimpl
    def log(self, record): ...


class Later(OnlyTells):
    """Its effect comes later, and it says so."""

    @hookimpl
    def inert(self): ...


class Asked(Plugin):
    """Has a hook that runs, and knows whether that did anything."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.calls = answer, []

    @hookimpl
    def bind(self): ...

    @hookimpl
    def inert(self, state):
        self.calls.append(state.step)
        return self.answer(state.world.rank) if callable(self.answer) else self.answer


class Gathers(Plugin):
    """Runs an action; ``Schedules`` puts it into the program."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    @hookimpl
    def handlers(self):
        return {Kind.UNSHARD: self.gather}

    def gather(self, action):
        self.calls += 1


class Schedules(Plugin):
    @hookimpl
    def schedule(self, microbatches):
        return (Action(Kind.UNSHARD, 0), *accumulate(microbatches))


def train(resolved, rank, world_size, observers):
    environment = Environment(rank, rank, world_size, world_size, "torchrun" if world_size > 1 else "none")
    with session(resolved, environment, RunDirectory(resolved.recipe.run.dir), observers) as trainer:
        trainer.train(Quiet(), Quiet())
    return trainer.state.step


def refusal(rank, world_size, resolved, observers):
    """(problems, step reached) of one rank; none if the run went to its end."""
    try:
        return [], train(resolved, rank, world_size, observers)
    except RecipeError as error:
        assert error.exit_status == 2
        return [(problem.key, problem.message, problem.fix) for problem in error.problems], None


def problems(resolved, observers=None, world_size=1):
    return [found for found, _ in run_ranks(world_size, refusal, resolved, observers)]


class Offers(Plugin):
    @hookimpl
    def kernels(self, world):
        yield Kernel("swiglu", "mine", lambda: {"swiglu": swiglu})


class Takes(Plugin):
    @hookimpl
    def rewrite(self, world, config):
        (kernel,) = world.kernels
        world.ops.replace(kernel.entries())


@pytest.fixture
def resolved(make_recipe):
    return make_recipe(SGD, **THREE_STEPS)


def test_a_plugin_without_a_hook_that_runs_is_named_with_reason_and_fix(resolved):
    ((first, second),) = problems(
        resolved, {"nothing": Nothing(), "tells": OnlyTells(), "asked": Asked(None), "observer": Observer()}
    )
    key, message, fix = first
    assert key == "plugins.nothing" and "plugins.nothing=null" in fix
    assert (
        message
        == "did nothing by the end of step 1: it implements no hook, and nothing that runs before the first step ends"
    )
    assert second[0] == "plugins.tells" and "it implements only plan, close" in second[1]


def test_a_plugin_that_offers_implementations_has_an_effect_when_one_is_taken(resolved):
    ((found,),) = problems(resolved, {"offers": Offers()})
    assert found[0] == "plugins.offers"
    assert found[1] == (
        "did nothing by the end of step 1: none of the implementations of operations that it offers was taken, "
        "or weighed against others"
    )
    assert problems(resolved, {"offers": Offers(), "takes": Takes()}) == [[]]


def test_a_plugin_that_says_so_may_have_its_effect_later(resolved):
    assert problems(resolved, {"later": Later()}) == [[]]


def test_what_a_plugin_says_of_itself_counts_more_than_its_hooks(resolved):
    (((key, message, _),),) = problems(resolved, {"asked": Asked("there was nothing to do")})
    assert key == "plugins.asked" and message == "did nothing by the end of step 1: there was nothing to do"


def test_a_handler_counts_if_the_program_calls_it(resolved):
    (((key, message, _),),) = problems(resolved, {"gathers": Gathers()})
    assert key == "plugins.gathers" and "only handlers" in message
    assert problems(resolved, {"gathers": Gathers(), "schedules": Schedules()}) == [[]]


def test_an_answer_that_is_no_reason_is_the_plugins_fault(resolved):
    for answer in (True, "", 3):
        with pytest.raises(PluginError, match="plugin 'asked', hook 'inert': must return a reason or None"):
            train(resolved, 0, 1, {"asked": Asked(answer)})


def only_rank_1(rank):
    return "rank 1 has no work" if rank == 1 else None


def different(rank):
    return f"rank {rank} has no work"


def test_what_one_rank_sees_stops_all_of_them(make_recipe):
    resolved = make_recipe(SGD, 2, **THREE_STEPS)
    found = problems(resolved, {"asked": Asked(only_rank_1), "nothing": Nothing()}, world_size=2)
    assert found[0] == found[1] and len(found[0]) == 2
    messages = {key: message for key, message, _ in found[0]}
    assert messages["plugins.asked"] == "did nothing by the end of step 1 on rank(s) 1: rank 1 has no work"
    assert messages["plugins.nothing"].startswith("did nothing by the end of step 1: ")
    ((one, other), _) = problems(resolved, {"asked": Asked(different)}, world_size=2)
    assert "on rank(s) 0: rank 0" in one[1] and "on rank(s) 1: rank 1" in other[1]


def asked_when(rank, world_size, resolved, monkeypatch):
    plugin, rounds = Asked(None), []
    real = effects.check
    monkeypatch.setattr(effects, "check", lambda *arguments: (rounds.append(1), real(*arguments)))
    steps = train(resolved, rank, world_size, {"asked": plugin})
    return plugin.calls, len(rounds), steps


def test_a_process_asks_once_also_when_it_continues_a_run(make_recipe, monkeypatch):
    plugins = {**SGD, "checkpoint": {"every_steps": 2}}
    first = make_recipe(plugins, 2, **THREE_STEPS)
    assert run_ranks(2, asked_when, first, monkeypatch) == [([1], 1, 3)] * 2
    longer = make_recipe(plugins, 2, training={"max_steps": 6, "log_every": 1})
    assert run_ranks(2, asked_when, longer, monkeypatch) == [([4], 1, 6)] * 2


def test_the_place_in_the_recipe_is_told(make_recipe):
    with pytest.raises(RecipeError) as caught:
        train(make_recipe(SGD, **THREE_STEPS), 0, 1, {"ddp": Asked("it slept")})
    (problem,) = caught.value.problems
    assert problem.file.endswith("recipe1.yaml") and problem.line is not None


class Own(Plugin):
    """Builds the model itself, so that nothing is known of it before."""

    @hookimpl
    def build_model(self, config):
        return Llama(config)


@pytest.mark.parametrize(
    ("options", "inert"),
    [
        ({"overlap": True, "bucket_size_mb": 25.0}, True),
        ({"bucket_size_mb": 25.0}, False),
        ({"overlap": False, "bucket_size_mb": 25.0}, False),
        ({"overlap": True, "bucket_size_mb": 0.005}, False),
    ],
)
def test_overlap_that_is_asked_for_needs_more_than_one_bucket(make_recipe, options, inert):
    """Told before anything is built where the model is known, and with the same size after a step of another."""
    resolved = make_recipe({"ddp": options, **SGD}, 2, **THREE_STEPS)
    told = check(resolved, 2, device="cpu").problems
    assert [problem.key for problem in told] == (["plugins.ddp.overlap"] if inert else [])
    found, again = problems(resolved, {"own": Own()}, world_size=2)
    assert found == again and [key for key, _, _ in found] == (["plugins.ddp"] if inert else [])
    if inert:
        assert "overlap has nothing to overlap: all gradients fit into one bucket, of 0.0" in told[0].message
        assert "lower plugins.ddp.bucket_size_mb, or remove overlap" in told[0].fix
        assert "all gradients fit into one bucket, of 0.0" in found[0][1]
        assert "lower plugins.ddp.bucket_size_mb, or remove overlap" in found[0][1]


def test_data_parallel_on_the_one_rank_that_there_is_trains(make_recipe):
    resolved = make_recipe({"ddp": {"overlap": True}, **SGD}, **THREE_STEPS)
    (records,) = record_ranks(resolved, 1)
    assert len(records) == 3
