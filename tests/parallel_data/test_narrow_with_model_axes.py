"""bf16 masters and fp16's decision to skip, where other ranks hold other parts of the model."""

import math

import pytest
import torch
from parallel_cases import MAX_NORM, MODEL, STEPS, plugins, run, torch_adamw, training
from precision_cases import assert_under, overall

from camshaft.data import prepare
from camshaft.plugin import Plugin, hookimpl
from camshaft.testing.reference import plain_run

BF16 = {"gradients": 2e-2, "norm": 5e-3, "weights": 1e-3, "exp_avg": 2e-2, "exp_avg_sq": 3e-2, "loss": 2e-4}


@pytest.mark.parametrize(
    ("row", "axis"),
    [
        ("ddp", "tp + sp"),
        ("ddp", "zbv"),
        ("zero 1", "tp"),
        ("zero 2", "1f1b"),
        ("zero 3", "tp + sp"),
        ("zero 3", "zbv"),
    ],
)
def test_narrow_parameters_follow_their_masters(make_recipe, row, axis):
    narrow = {"compute": "bf16", "parameters": "bf16", "gradients": "fp32"}
    whole = {"micro_batch_size": 12, "global_batch_size": 12}
    plain = make_recipe(plugins("none", compute=narrow), model=MODEL, batch=whole, training=training(STEPS))
    wanted = plain_run(plain, prepare(plain), torch_adamw, compute="bf16", parameters="bf16", max_norm=MAX_NORM)
    records = run(make_recipe, row, axis, accumulation=6 if axis == "zbv" else 3, compute=narrow)
    worst = overall(records, wanted)
    assert_under(worst, BF16)


class Overflow(Plugin):
    """In step 2 one rank's first gradient is not finite; afterwards no weight may have changed anywhere."""

    def __init__(self, rank):
        super().__init__()
        self.rank = rank

    @hookimpl
    def reduce_parts(self, state):
        held = [part for part in state.world.parts if part.pieces and part.tensor.grad is not None]
        if state.step == 1 and state.world.rank == self.rank:
            held[0].tensor.grad.view(-1)[0] = math.inf
        self.before = [part.tensor.detach().clone() for part in state.world.parts]

    @hookimpl
    def post_step(self, state):
        same = [torch.equal(part.tensor, one) for part, one in zip(state.world.parts, self.before, strict=True)]
        assert state.skipped == (state.step == 2), (state.world.rank, state.step)
        assert all(same) if state.skipped else not all(same)
        assert float(state.loss_scale) == (1024.0 if state.step < 2 else 512.0)


@pytest.mark.parametrize(
    ("row", "axis", "rank"),
    [("ddp", "tp", 1), ("zero 1", "tp + sp", 2), ("zero 3", "tp", 3), ("ddp", "1f1b", 2), ("zero 2", "zbv", 1)],
)
def test_one_overflow_on_one_rank_skips_the_step_on_all(make_recipe, row, axis, rank):
    precision = {"compute": "fp16", "initial_loss_scale": 1024.0}
    records = run(
        make_recipe,
        row,
        axis,
        accumulation=6 if axis == "zbv" else 3,
        compute=precision,
        observers={"overflow": Overflow(rank)},
    )
    assert [record.norm is None for record in records] == [False, True, False, False]
