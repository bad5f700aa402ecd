"""Metrics against their definitions: means over tokens, not over ranks or windows; rates over the interval."""

import math
from types import SimpleNamespace

import pytest
import torch

from camshaft import meter as module
from camshaft.data.loader import evaluation_batches
from camshaft.distributed import Environment
from camshaft.loop import session
from camshaft.meter import Meter
from camshaft.plugin import Plugin, hookimpl
from camshaft.recipe.length import sample_limit, total_steps
from camshaft.recipe.schema import Batch, Data, Recipe, Training
from camshaft.rundir import RunDirectory
from camshaft.testing.ranks import run_ranks
from camshaft.testing.run import Quiet

SETTINGS = {"sgd": {"lr": 0.1}, "clip": {"max_norm": 1.0}, "precision": {"compute": "fp64"}}
EVALUATED = {"eval/loss", "eval/perplexity", "eval/bits_per_byte"}


class Keeps(Plugin):
    """Keeps records, this rank's own sums, and whether dropout would be on in each forward."""

    def __init__(self):
        super().__init__()
        self.records, self.sums, self.losses, self.modes = [], [], [], []

    @hookimpl
    def around_forward(self, state, call):
        def forward(batch):
            self.modes.append(state.model.training)
            loss = call(batch)
            if state.model.training:
                self.losses.append(float(loss.detach()))
            return loss

        return forward

    @hookimpl
    def around_step(self, state, call):
        def step():
            self.sums.append((sum(self.losses), sum(int((b.labels >= 0).sum()) for b in state.window.batches)))
            self.losses = []
            call()

        return step

    @hookimpl
    def log(self, state, record):
        self.records.append(dict(record))
        if "train/loss" in record and state.step == 1:
            state.extras["plugin/keeps/once"] = 7.0


def kept(rank, world_size, resolved):
    keeps = Keeps()
    environment = Environment(rank, rank, world_size, world_size, "torchrun" if world_size > 1 else "none")
    with session(resolved, environment, RunDirectory(resolved.recipe.run.dir), {"keeps": keeps}) as trainer:
        trainer.train(Quiet(), Quiet())
        wanted = by_definition(trainer) if rank == 0 else None
    return keeps.records, keeps.sums, keeps.modes, wanted


def by_definition(trainer):
    """Loss, tokens and bytes of the validation set by the model as it is now, sample by sample."""
    loss, tokens, size = 0.0, 0, 0
    table = trainer.data.token_bytes
    with torch.no_grad():
        for batch in evaluation_batches(trainer.data.validation, 15, 1, 0, 1):
            loss += float(trainer.state.model(batch))
            labels = [label for label in batch.labels.flatten().tolist() if label >= 0]
            tokens += len(labels)
            size += sum(int(table[label]) for label in labels)
    return loss, tokens, size


def resolved_for(make_recipe, world_size):
    accumulation = 3 if world_size == 1 else 2
    base = make_recipe(SETTINGS, world_size, accumulation)
    training = {"max_steps": 3, "log_every": 1, "eval_every": 2, "eval_samples": 15}
    data = base.tree["data"] | {"validation_fraction": 0.2}
    return make_recipe(SETTINGS, world_size, accumulation, training=training, data=data)


@pytest.mark.parametrize("world_size", [1, 2])
def test_losses_are_means_over_tokens_whatever_the_ranks(make_recipe, world_size):
    ranks = run_ranks(world_size, kept, resolved_for(make_recipe, world_size))
    records, _, modes, (loss, tokens, size) = ranks[0]
    evaluated = [record for record in records if "eval/loss" in record]
    trained = [record for record in records if "train/loss" in record]
    assert [record["progress/global_step"] for record in evaluated] == [0, 2, 3], "first, every second, last"
    assert [record["progress/global_step"] for record in trained] == [1, 2, 3]
    last = evaluated[-1]
    assert last.keys() >= EVALUATED and not any(name.startswith("train/") for name in last)
    assert last["eval/loss"] == pytest.approx(loss / tokens, rel=1e-12)
    assert last["eval/perplexity"] == pytest.approx(math.exp(loss / tokens), rel=1e-12)
    assert last["eval/bits_per_byte"] == pytest.approx(loss / math.log(2) / size, rel=1e-12)
    for step, record in enumerate(trained):
        sums = [rank[1][step] for rank in ranks]
        assert record["train/loss"] == pytest.approx(sum(s for s, _ in sums) / sum(w for _, w in sums), rel=1e-12)
        assert record["progress/consumed_samples"] == 12 * (step + 1)
        assert record["progress/consumed_tokens"] == 12 * 32 * (step + 1)
    assert [("plugin/keeps/once" in record) for record in trained] == [False, True, False], "an extra is told once"
    for other in ranks[1:]:
        for one, two in zip(records, other[0], strict=True):
            shared = {name for name in one if not name.startswith(("perf/", "memory/"))}
            assert {name: one[name] for name in shared} == {name: two[name] for name in shared}
    assert modes[0] is False, "the first evaluation comes before training"
    assert modes.count(True) == 3 * (3 if world_size == 1 else 2), "every microbatch trains, all else evaluates"


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_rates_are_means_over_the_interval_without_evaluation(make_recipe, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=clock))
    resolved = resolved_for(make_recipe, 1)
    with session(resolved, Environment(), RunDirectory(resolved.recipe.run.dir)) as trainer:
        meter = Meter(trainer.state)

        def slow(batch):
            clock.now += 1000.0
            return trainer.state.model(batch)

        trainer.state.world.world_size = 4  # tokens are counted over all ranks, and are not divided by them
        for interval, seconds in (("first", 2.0), ("second", 8.0)):
            trainer.state.loader.wait_s += 0.5
            meter.count(384)
            meter.count(384)
            meter.evaluate(slow, trainer.data)
            assert trainer.state.model.training
            clock.now += seconds
            record = meter.record()
            assert record["perf/tokens_per_s"] == pytest.approx(768 / seconds), interval
            assert record["perf/step_time_s"] == pytest.approx(seconds / 2)
            assert record["perf/data_wait_frac"] == pytest.approx(0.5 / seconds)


def recipe(**training):
    return Recipe(
        schema_version=1,
        name="r",
        data=Data(sequence_length=32),
        batch=Batch(micro_batch_size=1, global_batch_size=12),
        training=Training(**training),
    )


@pytest.mark.parametrize(
    ("training", "samples", "steps"),
    [
        ({"max_steps": 7}, None, 7),
        ({"max_epochs": 2}, 470, 40),  # 39 windows of 12 and one of 2
        ({"max_tokens": 32 * 24}, 24, 2),
        ({"max_tokens": 32 * 24 + 1}, 25, 3),  # stop once so many were read, not before
    ],
)
def test_a_run_ends_with_its_last_sample_in_a_short_window(training, samples, steps):
    found = sample_limit(recipe(**training), 235)
    assert found == samples
    assert total_steps(recipe(**training), found, 12) == steps
