"""Gradients, weights and everything else with recomputation are in every bit what they are without."""

import pytest
from recompute_cases import FULL, MODES, assert_same, train


@pytest.fixture(scope="module")
def plain(request):
    """Records without recomputation by settings, each made once."""
    made = {}

    def find(make_recipe, key, *arguments, **settings):
        if key not in made:
            made[key] = train(make_recipe, *arguments, **settings)
        return made[key]

    return find


@pytest.mark.parametrize("mode", MODES)
def test_one_process_with_dropout_and_accumulation(make_recipe, plain, mode):
    wanted = plain(make_recipe, "one")
    assert_same(train(make_recipe, 1, MODES[mode]), wanted)


@pytest.mark.parametrize("mode", ["full", "selective", "budget", "offload"])
def test_autocast(make_recipe, plain, mode):
    wanted = plain(make_recipe, "bf16", compute="bf16")
    assert_same(train(make_recipe, 1, MODES[mode], compute="bf16"), wanted)


PARALLEL = {
    "ddp": {},
    "zero 1": {"plugins": {"ddp": None, "zero": {"stage": 1, "bucket_size_mb": 0.005}}},
    "zero 2": {"plugins": {"ddp": None, "zero": {"stage": 2, "bucket_size_mb": 0.005}}},
    "zero 3": {"plugins": {"ddp": None, "zero": {"stage": 3}}},
    "zero 3, small units": {
        "plugins": {"ddp": None, "zero": {"stage": 3, "units": ["model.layers.*.mlp", "model.layers.*.self_attn"]}}
    },
    "tp": {"plugins": {"ddp": None, "tensor_parallel": {}}, "parallel": {"tensor_parallel": 2}},
    "tp overlap": {"plugins": {"ddp": None, "tensor_parallel": {"sequence_parallel": True}},
                   "parallel": {"tensor_parallel": 2}},
    "sp": {"plugins": {"ddp": None, "tensor_parallel": {"sequence_parallel": True}},
           "parallel": {"tensor_parallel": 2}},
    "1f1b": {"plugins": {"ddp": None, "pipeline": {"schedule": "1f1b"}}, "parallel": {"pipeline_parallel": 2}},
    "zb_h1": {"plugins": {"ddp": None, "pipeline": {"schedule": "zb_h1"}}, "parallel": {"pipeline_parallel": 2}},
    "zbv": {"plugins": {"ddp": None, "pipeline": {"schedule": "zbv"}}, "parallel": {"pipeline_parallel": 2},
            "batch": {"micro_batch_size": 2, "global_batch_size": 12}},
    "dualpipe_v": {"plugins": {"ddp": None, "pipeline": {"schedule": "dualpipe_v"}},
                   "parallel": {"pipeline_parallel": 2}, "batch": {"micro_batch_size": 2, "global_batch_size": 12}},
}  # fmt: skip


@pytest.mark.parametrize("mode", ["full", "selective", "budget", "offload"])
@pytest.mark.parametrize("parallel", PARALLEL)
def test_two_ranks(make_recipe, plain, parallel, mode):
    settings = PARALLEL[parallel]
    wanted = plain(make_recipe, parallel, 2, **settings)
    assert_same(train(make_recipe, 2, MODES[mode], **settings), wanted)


def test_frozen_layers(make_recipe, plain):
    frozen = {"frozen": ("layers.0.", "layers.2.", "embed")}
    assert_same(train(make_recipe, 1, FULL, **frozen), train(make_recipe, 1, **frozen))
