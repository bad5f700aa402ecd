"""Dtypes: bf16 parameters with fp32 masters in every stage, autocast, and fp16's loss scale."""

import pytest
import torch
from deepspeed_cases import BF16, plugins, reference

from camshaft.models.init import values
from camshaft.models.roles import Initial
from camshaft.testing.compare import assert_within, compare
from camshaft.testing.run import record_ranks

pytestmark = pytest.mark.broad

SHORT = {"training": {"max_steps": 8, "log_every": 1}}
NARROW = {"compute": "bf16", "parameters": "bf16"}


@pytest.mark.parametrize("gradients", [None, "fp32"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_parameters_with_exact_masters(make_recipe, stage, gradients):
    precision = NARROW if gradients is None else {**NARROW, "gradients": gradients}
    options = {"reduce_bucket_size": None} if (stage, gradients) == (1, "fp32") else {}
    wanted = reference(make_recipe(plugins(precision=precision), **SHORT), "slow", compute="bf16", parameters="bf16")
    ranks = record_ranks(make_recipe(plugins(stage, "slow", precision, **options), 2, **SHORT), 2)
    assert_within(compare(ranks[0], wanted), BF16)
    last = ranks[0][-1]
    assert all(tensor.dtype == torch.float32 for tensor in last.weights.values()), "masters are fp32"
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in last.weights.values())


@pytest.mark.parametrize("stage", [1, 3])
def test_masters_begin_unrounded(make_recipe, stage):
    """DeepSpeed makes masters of rounded parameters; one step at almost no rate must leave the drawn values."""
    still = {**plugins(stage, precision=NARROW), "adamw": {"lr": 1e-30, "weight_decay": 0.0}}
    short = {"training": {"max_steps": 1, "log_every": 1}}
    for record in record_ranks(make_recipe({**still, "lr_schedule": None}, 2, **short), 2):
        weight = record[0].weights["model.layers.0.mlp.up_proj.weight"]
        drawn = values("model.layers.0.mlp.up_proj.weight", Initial(std=0.05), seed=3, start=0, stop=weight.numel())
        assert torch.equal(weight.view(-1), drawn)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_autocast_over_fp32_weights(make_recipe, stage):
    precision = {"compute": "bf16"}
    wanted = reference(make_recipe(plugins(precision=precision), **SHORT), compute="bf16")
    ranks = record_ranks(make_recipe(plugins(stage, precision=precision), 2, **SHORT), 2)
    assert_within(compare(ranks[0], wanted), {"loss": 1e-3, "norm": 5e-3, "weights": 1e-2})


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_fp16_skips_a_step_whose_gradients_overflow(make_recipe, stage):
    """The scale begins so high that steps are skipped: state stays, and later steps are those of one process."""
    precision = {"compute": "fp16", "initial_loss_scale": 2.0**24, "growth_interval": 1000}
    alone = record_ranks(make_recipe(plugins(precision=precision), **SHORT), 1)[0]
    ranks = record_ranks(make_recipe(plugins(stage, precision=precision), 2, **SHORT), 2)
    skipped = [record.step for record in alone if record.norm is None]
    assert skipped and skipped[-1] < 8, "the case has no step of both kinds"
    assert [record.step for record in ranks[0] if record.norm is None] == skipped
    first = ranks[0][skipped[0] - 1]
    assert not first.optimizer
    assert_within(compare(ranks[0][skipped[-1] :], alone[skipped[-1] :]), {"norm": 2e-2, "weights": 2e-3, "loss": 1e-3})
