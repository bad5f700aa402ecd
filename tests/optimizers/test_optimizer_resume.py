"""State of Adafactor, Lion, LAMB and Muon moves between layouts through checkpoints, and goes on the same."""

import pytest
import torch

from camshaft.data import prepare
from camshaft.models.llama import Llama
from camshaft.models.roles import owned_parameters, role
from camshaft.recipe import check
from camshaft.testing.compare import assert_bit_equal, assert_within, compare
from camshaft.testing.run import record_ranks
from camshaft_muon.memory import hidden_elements, moments

pytestmark = pytest.mark.broad

BOUNDS = dict.fromkeys(("gradients", "norm", "weights", "optimizer", "loss"), 1e-12) | {"lr": 1e-15}
OPTIMIZERS = {
    "adafactor": {"lr": 2e-3, "scale_by_weights": True},
    "lion": {"lr": 1e-3},
    "lamb": {"lr": 0.02},
    "muon": {"lr": 0.01, "adamw": {"lr": 2e-3}, "round_mb": 0.01},
}
ZERO3 = {"ddp": None, "zero": {"stage": 3}}
ZERO1 = {"ddp": None, "zero": {"stage": 1}}
PLAIN = {"ddp": None}
TP = {"ddp": None, "tensor_parallel": {"sequence_parallel": True}}
PP = {"ddp": None, "pipeline": {}}
DEGREES = {"tensor_parallel": 2, "pipeline": 2}
EVEN = {"num_attention_heads": 4, "num_key_value_heads": 2}
"""Heads that two ranks can share."""


def recipe(make, optimizer, layout, world_size, steps, tmp_path, resume="auto", model=None):
    plugins = {
        **layout,
        optimizer: OPTIMIZERS[optimizer],
        "clip": {"max_norm": 0.1},
        "precision": {"compute": "fp64"},
        "checkpoint": {"every_steps": 6, "resume": str(resume)},
    }
    folder = tmp_path / f"{world_size}-{steps}-{resume == 'auto'}"
    return make(
        plugins,
        world_size,
        accumulation=2,
        training={"max_steps": steps, "log_every": 1},
        run={"dir": str(folder)},
        parallel={f"{name.removesuffix('_parallel')}_parallel": DEGREES[name] for name in layout if name in DEGREES},
        **({} if model is None else {"model": make({}).tree["model"] | model}),
    )


@pytest.mark.parametrize(
    ("optimizer", "before", "after"),
    [
        pytest.param("adafactor", (2, ZERO1), (1, PLAIN), id="adafactor-zero1-to-plain"),
        pytest.param("lion", (2, ZERO3), (3, ZERO1), id="lion-zero3-to-zero1"),
        pytest.param("lamb", (2, ZERO3), (1, PLAIN), id="lamb-zero3-to-plain"),
        pytest.param("lamb", (1, PLAIN), (3, ZERO1), id="lamb-plain-to-zero1"),
        pytest.param("muon", (3, ZERO1), (1, PLAIN), id="muon-zero1-to-plain"),
        pytest.param("muon", (1, PLAIN), (2, ZERO3), id="muon-plain-to-zero3"),
        pytest.param("muon", (2, ZERO3), (3, ZERO1), id="muon-zero3-to-zero1"),
    ],
)
def test_a_run_goes_on_in_another_layout(make_recipe, tmp_path, optimizer, before, after):
    straight = recipe(make_recipe, optimizer, PLAIN, 1, 12, tmp_path)
    prepare(straight)
    (reference,) = record_ranks(straight, 1)
    first = recipe(make_recipe, optimizer, before[1], before[0], 6, tmp_path)
    record_ranks(first, before[0])
    second = recipe(make_recipe, optimizer, after[1], after[0], 12, tmp_path, resume=first.recipe.run.dir)
    ranks = record_ranks(second, after[0])
    assert [record.step for record in ranks[0]] == [7, 8, 9, 10, 11, 12], "it went on"
    assert_within(compare(ranks[0], reference[6:]), BOUNDS)
    for other in ranks[1:]:
        assert_bit_equal(ranks[0], other)


@pytest.mark.parametrize(
    ("optimizer", "before", "after"),
    [
        pytest.param("lamb", (2, TP), (1, PLAIN), id="lamb-tp-to-plain"),
        pytest.param("lamb", (2, PP), (4, TP | ZERO3), id="lamb-pp-to-tp-zero3"),
        pytest.param("muon", (4, TP | ZERO1), (2, PP), id="muon-tp-zero1-to-pp"),
        pytest.param("muon", (1, PLAIN), (4, TP | PP), id="muon-plain-to-tp-pp"),
        pytest.param("adafactor", (2, PP), (2, TP), id="adafactor-pp-to-tp"),
    ],
)
def test_a_run_goes_on_where_the_model_itself_is_divided(make_recipe, tmp_path, optimizer, before, after):
    straight = recipe(make_recipe, optimizer, PLAIN, 1, 12, tmp_path, model=EVEN)
    prepare(straight)
    (reference,) = record_ranks(straight, 1)
    first = recipe(make_recipe, optimizer, before[1], before[0], 6, tmp_path, model=EVEN)
    record_ranks(first, before[0])
    folder = first.recipe.run.dir
    second = recipe(make_recipe, optimizer, after[1], after[0], 12, tmp_path, resume=folder, model=EVEN)
    ranks = record_ranks(second, after[0])
    assert [record.step for record in ranks[0]] == [7, 8, 9, 10, 11, 12], "it went on"
    assert_within(compare(ranks[0], reference[6:]), BOUNDS)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"attention_bias": True, "qk_norm": True}])
def test_the_plan_tells_what_muon_keeps(make_recipe, changes):
    plain = make_recipe({"muon": {"lr": 0.01}})
    resolved = make_recipe({"muon": {"lr": 0.01}}, model=plain.tree["model"] | changes)
    config = check(resolved, 1).require().config
    with torch.device("meta"):
        model = Llama(config)
    sizes = {each.name: each.parameter.numel() for each in owned_parameters(model)}
    kinds = {each.name: role(each) for each in owned_parameters(model)}
    hidden = sum(size for name, size in sizes.items() if kinds[name] == "matrix" and name != "lm_head.weight")
    assert hidden_elements(config) == hidden > 0
    kept = moments(resolved.recipe)
    assert kept is not None and round(kept * sum(sizes.values())) == 2 * sum(sizes.values()) - hidden


@pytest.mark.parametrize(("optimizer", "bound"), [("adafactor", 1e-6), ("lion", 0.0), ("lamb", 1e-6), ("muon", 0.0)])
def test_narrow_parameters_with_wide_masters(make_recipe, optimizer, bound):
    """bf16 parameters: whole fp32 masters of the core and divided ones give the same weights; LAMB's norms differ by
    the order in which pieces are added."""
    precision = {"compute": "bf16", "parameters": "bf16", "gradients": "bf16", "reduce": "bf16"}
    runs = []
    for layout in ({}, ZERO1, ZERO3):
        plugins = {**layout, optimizer: OPTIMIZERS[optimizer], "precision": precision}
        resolved = make_recipe(plugins, 2, accumulation=1, training={"max_steps": 3, "log_every": 1})
        prepare(resolved)
        ranks = record_ranks(resolved, 2)
        assert_bit_equal(*ranks)
        runs.append(ranks[0])
    for records in runs:
        assert all(value.dtype == torch.float32 for value in records[-1].weights.values())
        assert_within(compare(records, runs[0]), {"gradients": 0.0, "weights": bound, "optimizer": 1e-6})
