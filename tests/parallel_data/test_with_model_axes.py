"""ddp and zero on two data ranks, times tensor or pipeline parallel, against one plain process."""

import pytest
from parallel_cases import EXACT, plugins, reference, training

from camshaft.testing.compare import assert_bit_equal, assert_within, compare
from camshaft.testing.run import record_ranks

STEPS = 4
MODEL = {
    "vocab_size": 259,
    "hidden_size": 16,
    "intermediate_size": 22,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
}
AXES = {
    "tp": {"tensor_parallel": {}},
    "tp + sp": {"tensor_parallel": {"sequence_parallel": True}},
    **{name: {"pipeline": {"schedule": name}} for name in ("1f1b", "interleaved_1f1b", "zb_h1", "zbv")},
}


def parallel(axis, row, data):
    section = {"tensor_parallel": 2} if axis.startswith("tp") else {"pipeline_parallel": 2}
    if row.startswith("hybrid"):
        section["data_parallel_shard"] = data // 2
    return section


def run(make_recipe, row, axis, data=2, accumulation=3, **more):
    resolved = make_recipe(
        plugins(row, **AXES[axis], **more),
        2 * data,
        model=MODEL,
        batch={"micro_batch_size": 12 // (accumulation * data), "global_batch_size": 12},
        training=training(STEPS),
        parallel=parallel(axis, row, data),
    )
    records = record_ranks(resolved, 2 * data, timeout_s=100)
    for other in records[1:]:
        assert_bit_equal(records[0], other)
    return records[0]


CASES = [
    *((row, axis) for row in ("ddp", "zero 1", "zero 2", "zero 3") for axis in ("tp + sp", "1f1b", "zbv")),
    ("zero 2 last", "interleaved_1f1b"),
    ("zero 3 last", "zb_h1"),
    ("zero 3 kept", "interleaved_1f1b"),
    ("zero 2", "tp"),
]


@pytest.mark.parametrize(("row", "axis"), CASES)
def test_two_by_two(make_recipe, row, axis):
    wanted = reference(make_recipe, STEPS, "axes", model=MODEL)
    accumulation = 6 if axis == "zbv" else 3
    assert_within(compare(run(make_recipe, row, axis, accumulation=accumulation), wanted), EXACT)
