"""Killed anywhere and started again, a run ends as if nothing had happened: bit-equal, every sample once."""

import json
import os
import random
import signal
from pathlib import Path

import pytest

from camshaft.distributed import Environment
from camshaft.loop import session
from camshaft.plugin import Plugin, hookimpl
from camshaft.rundir import RunDirectory
from camshaft.testing.compare import assert_bit_equal, assert_within, compare
from camshaft.testing.ranks import RankFailed, run_ranks
from camshaft.testing.run import Quiet, record_rank, record_ranks

STEPS, EVERY = 9, 2
PHASES = ("pre_forward", "post_backward", "reduce", "around_step", "post_step")


def plugins(compute="fp32", **checkpoint):
    return {
        "adamw": {"lr": 3e-3},
        "lr_schedule": {"type": "cosine", "warmup_steps": 3},
        "clip": {"max_norm": 0.1},
        "precision": {"compute": compute},
        "checkpoint": {"every_steps": EVERY, "keep_last": 2, **checkpoint},
        "jsonl": {},
    }


class KillsItself(Plugin):
    """Ends its own process with SIGKILL in one phase of one step, on the ranks that it is told."""

    def __init__(self, phase, step, ranks):
        super().__init__()
        self.phase, self.at, self.ranks = phase, step, ranks

    def _maybe(self, phase, state):
        if phase == self.phase and state.step == self.at and state.world.rank in self.ranks:
            os.kill(os.getpid(), signal.SIGKILL)

    @hookimpl
    def pre_forward(self, state):
        self._maybe("pre_forward", state)

    @hookimpl
    def post_backward(self, state):
        if state.final_backward:
            self._maybe("post_backward", state)

    @hookimpl
    def reduce(self, state):
        self._maybe("reduce", state)

    @hookimpl
    def around_step(self, state, call):
        def step():
            call()
            self._maybe("around_step", state)

        return step

    @hookimpl
    def post_step(self, state):
        self._maybe("post_step", state)


class KilledInSave(Plugin):
    """Ends its process at the ``count``-th file-system operation of the save after step ``at``."""

    def __init__(self, at, count):
        super().__init__()
        self.at, self.count = at, count

    @hookimpl
    def around_step(self, state, call):
        def step():
            call()
            if state.step + 1 == self.at:
                self._arm()

        return step

    def _arm(self):
        from camshaft_checkpoint import files

        left = [self.count]

        def counted(operation):
            def run(*arguments):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return operation(*arguments)

            return run

        for name in ("make_directory", "write", "sync", "rename", "unlink", "remove_directory"):
            setattr(files, name, counted(getattr(files, name)))


def kill_points():
    """20 points by a fixed seed: 12 in a step, on one rank or both, and 8 inside a save."""
    chooser = random.Random(11)
    inside = [
        KillsItself(chooser.choice(PHASES), chooser.randrange(1, STEPS - 1), chooser.choice([(0,), (1,), (0, 1)]))
        for _ in range(12)
    ]
    return [*inside, *(KilledInSave(chooser.choice([4, 6, 8]), chooser.randrange(1, 16)) for _ in range(8))]


def label(point):
    if isinstance(point, KilledInSave):
        return f"save{point.at}-operation{point.count}"
    return f"{point.phase}{point.at}-rank{''.join(map(str, point.ranks))}"


def steps_of(directory):
    lines = (Path(directory) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "train/loss" in record]


@pytest.fixture(scope="module")
def undisturbed():
    return {}


@pytest.mark.parametrize("point", kill_points(), ids=label)
def test_a_killed_run_continues_bit_for_bit(make_recipe, tmp_path, undisturbed, point):
    training = {"max_steps": STEPS, "log_every": 1}
    if not undisturbed:
        resolved = make_recipe(plugins(), 2, training=training, run={"dir": str(tmp_path / "whole")})
        undisturbed["records"] = record_ranks(resolved, 2)
        undisturbed["metrics"] = steps_of(tmp_path / "whole")
    resolved = make_recipe(plugins(), 2, training=training, run={"dir": str(tmp_path / "killed")})
    with pytest.raises(RankFailed, match="died without a report"):
        record_ranks(resolved, 2, {"killer": point}, timeout_s=60)
    again = record_ranks(resolved, 2)
    for mine, whole in zip(again, undisturbed["records"], strict=True):
        assert 1 <= len(mine) <= STEPS
        assert_bit_equal(mine, whole[-len(mine) :])
    got, wanted = steps_of(tmp_path / "killed"), undisturbed["metrics"]
    assert [record["progress/global_step"] for record in got] == list(range(1, STEPS + 1))
    for one, other in zip(got, wanted, strict=True):
        assert one["train/loss"] == other["train/loss"] and one["train/grad_norm"] == other["train/grad_norm"]


def segment(rank, world_size, resolved, steps):
    """Train until ``steps``, as a run that is stopped there; returns rows (as text) by step, and the weights."""
    rows = {}

    class Reads(Plugin):
        @hookimpl
        def pre_forward(self, state, batch):
            for tokens, labels in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True):
                if any(label >= 0 for label in labels):
                    rows.setdefault(state.step, []).append(str(tokens))

    environment = Environment(rank, rank, world_size, world_size, "torchrun" if world_size > 1 else "none")
    with session(resolved, environment, RunDirectory(resolved.recipe.run.dir), {"reads": Reads()}) as trainer:
        trainer.state.world.total_steps = min(steps, trainer.state.world.total_steps)
        trainer.train(Quiet(), Quiet())
        weights = {name: p.detach().clone() for name, p in trainer.state.model.named_parameters()}
        return rows, weights, trainer.state.consumed_samples


def by_step(results):
    merged = {}
    for rows, _, _ in results:
        for step, seen in rows.items():
            merged.setdefault(step, []).extend(seen)
    return {step: sorted(seen) for step, seen in merged.items()}


def test_what_ran_on_two_ranks_continues_on_one_and_on_four(make_recipe, tmp_path):
    settings = plugins("fp64")
    sections = {"training": {"max_epochs": 1, "log_every": 1}, "run": {"dir": str(tmp_path / "moved")}}
    whole = make_recipe(settings, 1, **{**sections, "run": {"dir": str(tmp_path / "whole")}})
    reference = run_ranks(1, segment, whole, 99, timeout_s=120)
    first = run_ranks(2, segment, make_recipe(settings, 2, **sections), 7, timeout_s=120)
    second = run_ranks(1, segment, make_recipe(settings, 1, **sections), 13, timeout_s=120)
    third = run_ranks(4, segment, make_recipe(settings, 4, **sections), 99, timeout_s=120)
    seen = by_step(first) | by_step(second) | by_step(third)
    assert sorted(seen) == list(range(20)), "every window once"
    assert len(by_step(first)) == 7 and len(by_step(second)) == 6 and len(by_step(third)) == 7
    assert seen == by_step(reference), "the same samples in the same windows: none lost, none twice"
    assert sum(map(len, seen.values())) == 235
    assert {consumed for _, _, consumed in third} == {235}
    for _, weights, _ in third:
        for name, weight in weights.items():
            wanted = reference[0][1][name]
            assert float((weight - wanted).norm() / wanted.norm()) <= 1e-12, name


def test_asynchronous_checkpoints_continue_bit_for_bit(make_recipe, tmp_path):
    training = {"max_steps": STEPS, "log_every": 1}
    whole = record_ranks(make_recipe(plugins(), 2, training=training, run={"dir": str(tmp_path / "w")}), 2)
    resolved = make_recipe(plugins(**{"async": True}), 2, training=training, run={"dir": str(tmp_path / "k")})
    with pytest.raises(RankFailed):
        record_ranks(resolved, 2, {"killer": KillsItself("reduce", 5, (1,))}, timeout_s=60)
    again = record_ranks(resolved, 2)
    for mine, all_steps in zip(again, whole, strict=True):
        assert_bit_equal(mine, all_steps[-len(mine) :])


def test_a_finished_run_has_nothing_left_to_do_and_says_so(make_recipe, tmp_path, caplog):
    resolved = make_recipe(plugins(), 1, training={"max_steps": 4, "log_every": 1}, run={"dir": str(tmp_path / "r")})
    assert len(record_ranks(resolved, 1)[0]) == 4
    assert record_rank(0, 1, resolved) == []
    assert "nothing left to do: the run is at step 4, and the recipe ends at step 4" in caplog.text


def test_another_optimizer_state_would_be_seen(make_recipe, tmp_path):
    """The comparison must fail when a resume loses the optimizer: a fresh AdamW on the same weights is not equal."""
    training = {"max_steps": STEPS, "log_every": 1}
    whole = record_ranks(make_recipe(plugins(), 1, training=training, run={"dir": str(tmp_path / "w")}), 1)[0]
    sections = {"training": training, "run": {"dir": str(tmp_path / "k")}}
    with pytest.raises(RankFailed):
        record_ranks(make_recipe(plugins(), 1, **sections), 1, {"killer": KillsItself("reduce", 5, (0,))})
    lossy = record_ranks(make_recipe(plugins(), 1, **sections), 1, {"forgets": ForgetsMoments()})[0]
    worst = compare(lossy, whole[-len(lossy) :])
    with pytest.raises(AssertionError, match="weights"):
        assert_within(worst, {"weights": 1e-5})


class ForgetsMoments(Plugin):
    @hookimpl
    def pre_run(self, state):
        state.optimizer.state.clear()
