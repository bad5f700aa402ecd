"""Compiled runs have the numbers of uncompiled ones, beside whatever divides or reduces the model."""

import pytest
from compile_cases import EXACT, TRACED, Plugin, Seen, assert_within, compare, hookimpl, recipe, records_of, run

pytestmark = pytest.mark.broad

CASES = {
    "alone": (1, {}, {}),
    "ddp": (2, {}, {}),
    "zero 1": (2, {"ddp": None, "zero": {"stage": 1, "bucket_size_mb": 0.01}}, {}),
    "zero 3": (2, {"ddp": None, "zero": {"stage": 3}}, {}),
    "zero 3 by fully_shard": (2, {"ddp": None, "zero": {"stage": 3, "provider": "torch"}}, {}),
    "tp": (2, {"tensor_parallel": {}}, {"parallel": {"tensor_parallel": 2}}),
    "tp + sp": (2, {"tensor_parallel": {"sequence_parallel": True}}, {"parallel": {"tensor_parallel": 2}}),
    "1f1b": (2, {"pipeline": {"schedule": "1f1b"}}, {"parallel": {"pipeline_parallel": 2}}),
    "recompute": (1, {"recompute": {"mode": "full"}}, {}),
    "recompute, zero 3": (2, {"ddp": None, "zero": {"stage": 3}, "recompute": {"mode": "full"}}, {}),
    "selective": (1, {"recompute": {"mode": "selective"}}, {}),
    "recompute, tp": (
        2,
        {"tensor_parallel": {}, "recompute": {"mode": "full"}},
        {"parallel": {"tensor_parallel": 2}},
    ),
    "selective, tp": (
        2,
        {"tensor_parallel": {}, "recompute": {"mode": "selective"}},
        {"parallel": {"tensor_parallel": 2}},
    ),
    "deepspeed 2": (2, {"ddp": None, "deepspeed": {"stage": 2}}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_numbers_of_the_uncompiled_run(case, make_recipe, tmp_path):
    ranks, plugins, sections = CASES[case]
    compute = "fp32" if case.startswith("deepspeed") else "fp64"
    bounds = EXACT if compute == "fp64" else dict.fromkeys(EXACT, 1e-05)
    plain = run(recipe(make_recipe, ranks, plugins=plugins, compute=compute, **sections), ranks)
    seen = Seen(tmp_path / "seen")
    compiled = run(
        recipe(make_recipe, ranks, TRACED, plugins=plugins, compute=compute, **sections), ranks, {"seen": seen}
    )
    assert len(compiled) == 4
    assert_within(compare(compiled, plain), bounds)
    for rank in range(ranks):
        for record in records_of(tmp_path / "seen", rank):
            assert record["plugin/compile/graph_breaks"] == 0
            assert record["plugin/compile/recompiles"] == 0


class Frozen(Plugin):
    """Owns ``build_model``: one layer does not train, and a part of another one."""

    @hookimpl
    def build_model(self, config, world):
        from camshaft.models.llama import Llama

        model = Llama(config, world.ops)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not ("layers.1." in name or "layers.0.mlp" in name))
        return model


def both(make_recipe, tmp_path, ranks, options, plugins, observers, **sections):
    """The compiled run has the other's numbers, and compiles nothing after its first window."""
    plain = run(recipe(make_recipe, ranks, plugins=plugins, **sections), ranks, observers)
    observers = {**observers, "seen": Seen(tmp_path / "seen")}
    compiled = run(recipe(make_recipe, ranks, options, plugins=plugins, **sections), ranks, observers)
    assert_within(compare(compiled, plain), EXACT)
    assert all(record["plugin/compile/recompiles"] == 0 for record in records_of(tmp_path / "seen"))


def test_frozen_layers_get_graphs_of_their_own_in_the_warm_up(make_recipe, tmp_path):
    plugins = {"ddp": None, "zero": {"stage": 3}}
    both(make_recipe, tmp_path, 2, TRACED, plugins, {"model": Frozen()})


def test_parts_of_layers_with_masks_and_parameters_that_arrive_late(make_recipe, tmp_path):
    """Stage 2 lets modules wait for their parameters: here a compiled part of a layer does, and modules beside it."""
    options = {**TRACED, "modules": ["model.layers.*.mlp", "model.layers.1.self_attn"]}
    plugins = {"ddp": None, "zero": {"stage": 2, "bucket_size_mb": 0.01}}
    data = recipe(make_recipe, 2).tree["data"] | {"pack": True, "document_mask": True}
    both(make_recipe, tmp_path, 2, options, plugins, {}, data=data, training={"max_steps": 4, "log_every": 1})
