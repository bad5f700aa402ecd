"""Stages 0 to 3 against one plain process: gradients, norm, weights, state, loss; with uneven tokens and clipping."""

import pytest
import torch
from deepspeed_cases import FP32, Variant, change, plugins, reference

from camshaft.testing.compare import assert_within, compare
from camshaft.testing.run import record_ranks

pytestmark = pytest.mark.broad

STAGES = (0, 1, 2, 3)


@pytest.fixture
def run(make_recipe):
    def go(
        stage, world_size, observers=None, optimizer="adamw", accumulation=3, precision=None, sections=None, **options
    ):
        chosen = plugins(stage, optimizer, precision, **options)
        return record_ranks(make_recipe(chosen, world_size, accumulation, **(sections or {})), world_size, observers)

    return go


def same_on_all(ranks):
    """Replicas of what every rank has, and the whole of what is divided, as each rank assembled it."""
    for other in ranks[1:]:
        for one, two in zip(ranks[0], other, strict=True):
            assert all(torch.equal(one.weights[name], two.weights[name]) for name in one.weights)
            assert (one.norm, one.loss) == (two.norm, two.loss)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_is_one_plain_process(make_recipe, run, stage):
    wanted = reference(make_recipe(plugins()))
    assert len(wanted) == 20 and all(record.norm > 0.1 for record in wanted), "clipping must be active in every step"
    for world_size in (1, 2):
        ranks = run(stage, world_size)
        assert_within(compare(ranks[0], wanted), FP32)
        same_on_all(ranks)


UNTIED = {
    "tie_word_embeddings": False,
    "attention_bias": True,
    "qk_norm": True,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("stage", [1, 3])
def test_three_ranks_with_biases_and_untied_embeddings(make_recipe, run, stage):
    """Nothing is divisible by 3, norms and biases alternate, and the average of stage 3 is no power of two."""
    sections = {
        "model": make_recipe(plugins()).tree["model"] | UNTIED,
        "training": {"max_steps": 6, "log_every": 1},
    }
    wanted = reference(make_recipe(plugins(optimizer="sgd"), **sections), "sgd")
    ranks = (
        run(stage, 3, optimizer="sgd", accumulation=2, sections=sections, sub_group_size=3000)
        if stage == 3
        else run(stage, 3, optimizer="sgd", accumulation=2, sections=sections)
    )
    assert_within(compare(ranks[0], wanted), FP32)
    same_on_all(ranks)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(
    ("accumulation", "options"),
    [(1, {}), (4, {"overlap_comm": True}), (4, {"overlap_comm": False, "contiguous_gradients": False})],
)
def test_accumulation_and_ways_to_reduce_change_nothing(make_recipe, run, stage, accumulation, options):
    sections = {
        "batch": {"micro_batch_size": 8 // accumulation, "global_batch_size": 16},
        "training": {"max_steps": 6, "log_every": 1},
    }
    wanted = reference(make_recipe(plugins(), **sections))
    ranks = run(stage, 2, sections=sections, **options)
    assert_within(compare(ranks[0], wanted), FP32)
    same_on_all(ranks)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "changes",
    [
        {"frozen": ("layers.1.", "norm"), "unused": False},
        {"frozen": ("embed_tokens",), "unused": True},
    ],
    ids=["frozen-layers", "frozen-tied-and-unused"],
)
def test_frozen_tied_and_unused_parameters(make_recipe, run, stage, changes):
    sections = {"training": {"max_steps": 6, "log_every": 1}}
    wanted = reference(make_recipe(plugins(), **sections), prepare_model=lambda model: change(model, **changes))
    for world_size in (1, 2) if stage == 3 else (2,):
        ranks = run(stage, world_size, {"variant": Variant(**changes)}, sections=sections)
        assert_within(compare(ranks[0], wanted), FP32)
        same_on_all(ranks)
    first, last = ranks[0][0], ranks[0][-1]
    for name in first.weights:
        if any(part in name for part in changes["frozen"]) or name == "unused":
            assert torch.equal(first.weights[name], last.weights[name]), f"{name} moved"
            assert not any(key.startswith(f"{name}/") for key in last.optimizer)


@pytest.mark.parametrize("stage", [1, 3])
def test_an_optimizer_of_our_own(make_recipe, run, stage):
    """Lion is no class that DeepSpeed has heard of; it works element by element, and that is enough."""
    sections = {"training": {"max_steps": 6, "log_every": 1}}
    lion = {"adamw": None, "lion": {"lr": 1e-4}}
    alone = record_ranks(make_recipe({**plugins(), **lion}, 1, **sections), 1)[0]
    ranks = record_ranks(make_recipe({**plugins(stage), **lion}, 2, **sections), 2)
    assert_within(compare(ranks[0], alone), FP32)
