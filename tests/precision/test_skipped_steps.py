"""Steps of fp16 whose gradients overflow: skipped on all ranks, nothing changed, counted, and gone on after."""

import math
from dataclasses import replace

import pytest
import torch
from precision_cases import LR, MAX_NORM, assert_under, factor, overall, plugins, torch_adamw

from camshaft.data import prepare
from camshaft.distributed import Environment
from camshaft.errors import Interrupted
from camshaft.loop import session
from camshaft.plugin import Plugin, hookimpl
from camshaft.rundir import RunDirectory
from camshaft.testing.compare import assert_bit_equal
from camshaft.testing.ranks import RankFailed, run_ranks
from camshaft.testing.record import Probe
from camshaft.testing.reference import plain_run
from camshaft.testing.run import Quiet

pytestmark = pytest.mark.broad

SCALE, SKIPPED = "plugin/precision/loss_scale", "plugin/precision/skipped_steps"


FP16 = {"gradients": 1e-3, "norm": 2e-4, "weights": 5e-5, "exp_avg": 2e-3, "exp_avg_sq": 2e-3, "loss": 2e-5}
"""20 steps of fp16, whose values are off by up to 4.9e-4. Measured over all cases here: gradients 5.6e-4, norm 7.6e-5,
weights 1.5e-5, moments 8.6e-4, loss 7.4e-6."""


class Overflows(Plugin):
    """On one rank, in some steps: a gradient that is not finite, in one microbatch's backward, in a parameter's reduced
    gradient, or in that of a part of which only this rank holds anything."""

    def __init__(self, steps, rank=0, where="backward"):
        super().__init__()
        self.steps, self.rank, self.where = set(steps), rank, where

    def _now(self, state):
        return state.world.rank == self.rank and state.step + 1 in self.steps

    @hookimpl
    def bind(self, state):
        def poison(gradient):
            bad = self.where == "backward" and self._now(state) and state.microbatch == 1
            return gradient * math.inf if bad else gradient

        state.model.model.layers[1].mlp.up_proj.weight.register_hook(poison)

    @hookimpl
    def reduce(self, state):
        if self.where == "reduced" and self._now(state):
            state.model.model.norm.weight.grad[3] = math.nan
        if self.where == "divided" and self._now(state):
            part = next(part for part in state.world.parts if part.pieces)
            part.tensor.grad.view(-1)[0] = -math.inf


class Keeps(Plugin):
    """What each step left: parameters as they compute, and numbers of the state; and every log record."""

    def __init__(self):
        super().__init__()
        self.steps, self.records = [], []

    @hookimpl
    def log(self, record):
        self.records.append(dict(record))

    @hookimpl
    def post_step(self, state):
        self.steps.append(
            {
                "parameters": {n: p.detach().clone() for n, p in state.model.named_parameters()},
                "skipped": state.skipped,
                "numbers": (state.step, state.consumed_samples, state.grad_norm is None),
            }
        )


def rank_run(rank, world_size, resolved, observers, stop_after=None):
    """Train one rank; (records, what Keeps kept, log records, whether it was interrupted)."""
    probe, keeps = Probe(), Keeps()
    environment = Environment(rank, rank, world_size, world_size, "torchrun" if world_size > 1 else "none")
    directory, stopped = RunDirectory(resolved.recipe.run.dir), False
    everyone = {**observers, "probe": probe, "keeps": keeps}
    try:
        with session(resolved, environment, directory, everyone) as trainer:
            trainer.train(Quiet(), Stops(trainer.state, stop_after))
    except Interrupted:
        stopped = True
    return probe.records, keeps.steps, keeps.records, stopped


class Stops:
    """Asks to stop while step ``after`` runs."""

    def __init__(self, state, after):
        self.state, self.after = state, after

    @property
    def requested(self):
        return int(self.after is not None and self.state.step + 1 == self.after)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("where", ["backward", "reduced"])
@pytest.mark.parametrize("parameters", [None, "fp16"], ids=["autocast", "masters"])
def test_an_overflow_on_one_rank_skips_the_step_on_all(make_recipe, where, parameters):
    settings = plugins(compute="fp16", parameters=parameters, growth_interval=3)
    resolved = make_recipe(settings, 2, training={"max_steps": 9, "log_every": 1})
    bad = {1, 4, 5}
    ranks = run_ranks(2, rank_run, resolved, {"overflows": Overflows(bad, rank=1, where=where)})
    for records, kept, logs, _ in ranks:
        assert {number + 1 for number, each in enumerate(kept) if each["skipped"]} == bad
        assert [each["numbers"] for each in kept] == [(n, 12 * n, n in bad) for n in range(1, 10)], "steps go on"
        assert records[0].optimizer == {}, "a skipped first step makes no optimizer state"
        for number in (4, 5):
            now, before = number - 1, number - 2
            assert same(records[now].weights, records[before].weights)
            assert same(records[now].optimizer, records[before].optimizer), "also the optimizer's step counter"
            assert same(kept[now]["parameters"], kept[before]["parameters"])
        rates = [LR * factor(step, 9) for step in range(9)]
        assert [record.lr for record in records] == pytest.approx(rates, rel=1e-12), "the schedule goes on"
        for number in (2, 3, 6, 7, 8, 9):
            assert not same(records[number - 1].weights, records[number - 2].weights)
        steps = {float(v) for name, v in records[-1].optimizer.items() if name.endswith("/step")}
        assert steps == {6.0}
        # Halved after 1; good 2, 3; halved after 4 and 5; good 6, 7, 8: doubled.
        assert [log[SCALE] / 2**16 for log in logs] == [1 / 2] * 3 + [1 / 4, 1 / 8, 1 / 8, 1 / 8, 1 / 4, 1 / 4]
        assert [log[SKIPPED] for log in logs] == [1, 1, 1, 2, 3, 3, 3, 3, 3]
        assert [log["progress/global_step"] for log in logs if "train/grad_norm" not in log] == sorted(bad)
        assert all(math.isfinite(value) for log in logs for value in log.values())
    assert_sound_steps_bit_equal(ranks[0][0], ranks[1][0], bad)


def assert_sound_steps_bit_equal(one, other, bad):
    """Ranks agree in every bit; of a skipped step the gradients, which nobody used, are left out."""
    blank = [[replace(r, gradients={}) if r.step in bad else r for r in records] for records in (one, other)]
    assert_bit_equal(*blank)


@pytest.mark.parametrize("parameters", [None, "fp16"], ids=["autocast", "masters"])
@pytest.mark.parametrize("stage", [1, 3])
def test_an_overflow_that_only_one_rank_can_see_skips_the_step_on_all(make_recipe, stage, parameters):
    """Divided over ranks, gradients of one rank's shard are nobody else's; the same steps as under ddp follow."""
    settings = plugins(lr=1e-3, compute="fp16", parameters=parameters, growth_interval=3)
    training, bad = {"max_steps": 7, "log_every": 1}, {1, 4}
    divided = make_recipe(settings | {"ddp": None, "zero": {"stage": stage}}, 2, training=training)
    ranks = run_ranks(2, rank_run, divided, {"overflows": Overflows(bad, rank=1, where="divided")})
    whole = make_recipe(settings, 2, training=training)
    (wanted, _, wanted_logs, _), _ = run_ranks(2, rank_run, whole, {"overflows": Overflows(bad, where="reduced")})
    for records, kept, logs, _ in ranks:
        assert {n + 1 for n, each in enumerate(kept) if each["skipped"]} == bad
        assert same(records[3].weights, records[2].weights) and same(records[3].optimizer, records[2].optimizer)
        assert [(log[SCALE], log[SKIPPED]) for log in logs] == [(log[SCALE], log[SKIPPED]) for log in wanted_logs]
        assert_under(overall(records, wanted), FP16)


def test_a_skipped_first_step_leaves_the_first_values(make_recipe):
    resolved = make_recipe(plugins(compute="fp16"), training={"max_steps": 5, "log_every": 1})
    records, _, logs, _ = rank_run(0, 1, resolved, {"overflows": Overflows({1})})
    first = {name: p.detach().clone() for name, p in opened(resolved).items()}
    assert same(records[0].weights, first) and not same(records[1].weights, first)
    assert float(records[1].optimizer["model.norm.weight/step"]) == 1.0
    assert [log[SKIPPED] for log in logs] == [1] * 5


def opened(resolved):
    with session(resolved, Environment(), RunDirectory(resolved.recipe.run.dir)) as trainer:
        return dict(trainer.state.model.named_parameters())


def test_at_the_smallest_scale_the_run_ends_on_all_ranks_with_the_reason(make_recipe):
    settings = plugins(compute="fp16", initial_loss_scale=2.0)
    resolved = make_recipe(settings, 2, training={"max_steps": 9, "log_every": 1})
    with pytest.raises(RankFailed) as failure:
        run_ranks(2, rank_run, resolved, {"overflows": Overflows({2, 3, 4}, where="reduced")})
    text = str(failure.value)
    for rank in (0, 1):
        report = text.split(f"rank {rank}: ")[1]
        assert "NonFiniteLoss: gradients are not finite in fp16 at step 3, with a loss scale of 1" in report
        assert "plugins.precision.compute=bf16" in report


@pytest.mark.parametrize("parameters", [None, "fp16"], ids=["autocast", "masters"])
@pytest.mark.parametrize(
    ("world_size", "accumulation", "first", "interval"),
    [(1, 1, 2.0**24, 2), (2, 3, 2.0**12, 2000)],
    ids=["overflows-by-itself", "two-ranks-with-accumulation"],
)
def test_training_equals_a_plain_loop_with_torchs_scaler(
    make_recipe, parameters, world_size, accumulation, first, interval
):
    """Whether a sum overflows depends on how many samples are in it, so overflows are compared on equal microbatches:
    the first steps overflow by themselves, and again each time when the scale has grown."""
    scale = {"initial_loss_scale": first, "growth_interval": interval}
    resolved = make_recipe(
        plugins(lr=1e-3, compute="fp16", parameters=parameters, **scale), world_size, accumulation=accumulation
    )
    wanted = plain_run(
        resolved,
        prepare(resolved),
        torch_adamw(fused=False, lr=1e-3),
        compute="fp16",
        parameters=parameters,
        max_norm=MAX_NORM,
        factor=factor,
        loss_scale=(first, interval),
    )
    ranks = run_ranks(world_size, rank_run, resolved, {})
    skipped = [record.step for record in wanted if record.norm is None]
    assert len(skipped) > 3 and skipped[0] == 1 if interval == 2 else not skipped
    for records, kept, _, _ in ranks:
        assert [n + 1 for n, each in enumerate(kept) if each["skipped"]] == skipped
        assert_sound_steps_bit_equal(records, ranks[0][0], skipped)
    assert_under(overall(ranks[0][0], wanted), FP16)


CHECKPOINT = {"checkpoint": {"every_steps": 100}}


@pytest.mark.parametrize("parameters", [None, "fp16"], ids=["autocast", "masters"])
def test_a_run_that_goes_on_has_its_scale_and_counters(make_recipe, tmp_path, parameters):
    """Stopped in a skipped step, which can be saved, and continued: every bit as in the run that was never stopped."""
    settings = plugins(compute="fp16", parameters=parameters, growth_interval=3) | CHECKPOINT
    overflows, training = {"overflows": Overflows({2, 5, 8})}, {"max_steps": 12, "log_every": 1}
    through = make_recipe(settings, 2, training=training, run={"dir": str(tmp_path / "through")})
    stopped = make_recipe(settings, 2, training=training, run={"dir": str(tmp_path / "stopped")})
    (whole, _, logs, _), _ = run_ranks(2, rank_run, through, overflows)
    (begun, _, early, interrupted), _ = run_ranks(2, rank_run, stopped, overflows, 5)
    assert interrupted and len(begun) == 5 and early[-1][SKIPPED] == 2
    (rest, kept, late, _), _ = run_ranks(2, rank_run, stopped, overflows)
    assert [record.step for record in rest] == list(range(6, 13)) and kept[2]["skipped"]
    assert_sound_steps_bit_equal(begun + rest, whole, {2, 5, 8})
    for key in (SCALE, SKIPPED, "train/loss"):
        assert [log[key] for log in early + late] == [log[key] for log in logs]
    assert late[-1][SKIPPED] == 3
