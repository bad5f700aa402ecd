"""The life of a run: what it leaves behind, a second one in the same process, and one that was killed."""

import gc
import os
import signal

import pytest
import torch
from zero_cases import assert_same, plugins, sections, train_unseen

from camshaft.cli.closing import sample, speaks
from camshaft.data import prepare
from camshaft.distributed import Environment
from camshaft.loop import session
from camshaft.plugin import Plugin, hookimpl
from camshaft.rundir import RunDirectory
from camshaft.testing.compare import assert_bit_equal
from camshaft.testing.ranks import RankFailed, run_ranks
from camshaft.testing.run import Quiet, record_ranks
from camshaft_zero.reducer import Reducer

ROWS = ("1", "2", "3")


def once(rank, world_size, resolved, directory):
    environment = Environment(rank, rank, world_size, world_size, "torchrun" if world_size > 1 else "none")
    with session(resolved, environment, RunDirectory(directory)) as trainer:
        trainer.train(Quiet(), Quiet())
    return trainer


def hooks_of(model):
    """Hooks on modules and parameters, by name; only torch's own attributes tell."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    found = [f"{name} {kind}" for name, module in model.named_modules() for kind in kinds if getattr(module, kind)]
    return found + [name for name, each in model.named_parameters() if each._post_accumulate_grad_hooks]


def lives(rank, world_size, resolved, directory):
    """Two runs one after the other in one process; the model of the first is used in between."""
    first = once(rank, world_size, resolved, f"{directory}/first")
    model = first.state.model
    assert hooks_of(model) == [] and first.state.world.readable
    data = prepare(resolved)
    assert speaks(first.state, data) and sample(first.state, data).startswith("sample of the model after step 5")
    weights = {name: each.detach().clone() for name, each in model.named_parameters()}
    assert all(bool(torch.isfinite(each).all()) for each in weights.values())
    assert all(each.grad is None for each in model.parameters())
    del model, first
    gc.collect()
    left = [each for each in gc.get_objects() if type(each) is Reducer]
    assert left == [], "a run that is over holds nothing"
    second = once(rank, world_size, resolved, f"{directory}/second")
    assert_same({name: each.detach() for name, each in second.state.model.named_parameters()}, weights)
    return weights


def recipe(make_recipe, row, world_size=2, **more):
    changed = sections(row, world_size, 2, 5)
    return make_recipe({**plugins(row, compute="fp32"), **more}, world_size, **changed)


@pytest.mark.parametrize("row", ROWS)
def test_a_second_run_in_one_process_is_the_first_again(make_recipe, tmp_path, row):
    one, other = run_ranks(2, lives, recipe(make_recipe, row), str(tmp_path), timeout_s=120)
    assert_same(one, other)


class Dies(Plugin):
    """Ends one rank with SIGKILL in the middle of a step."""

    @hookimpl
    def post_backward(self, state):
        if state.step == 3 and state.final_backward and state.world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("row", ["2", "3"])
def test_a_killed_run_continues_bit_for_bit(make_recipe, tmp_path, row):
    every = {"checkpoint": {"every_steps": 2, "keep_last": 2}}

    def go(folder, **extra):
        changed = {**sections(row, 2, 2, 6), "run": {"dir": str(tmp_path / folder)}}
        return record_ranks(make_recipe({**plugins(row, compute="fp32"), **every}, 2, **changed), 2, extra)

    whole = go("whole")
    with pytest.raises(RankFailed, match="died without a report"):
        go("killed", dies=Dies())
    again = go("killed")
    for mine, wanted in zip(again, whole, strict=True):
        assert len(mine) == 4, "from the checkpoint after step 2"
        assert_bit_equal(mine, wanted[2:])


class Raises(Plugin):
    """Fails on one rank while gathers are under way."""

    @hookimpl
    def pre_forward(self, state):
        if state.step == 2 and state.world.rank == 1:
            raise ValueError("on purpose")


@pytest.mark.parametrize("row", ROWS)
def test_a_rank_that_fails_is_named_and_nobody_hangs(make_recipe, row):
    with pytest.raises(RankFailed, match="ValueError: on purpose") as failed:
        train_unseen(make_recipe, row, 2, extra={"raises": Raises()})
    assert "did not end in time" not in str(failed.value)
