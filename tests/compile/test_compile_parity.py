"""Compiled runs have the numbers of uncompiled ones, beside whatever divides or reduces the model."""

import pytest
from compile_cases import EXACT, TRACED, Seen, assert_within, compare, recipe, records_of, run

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
