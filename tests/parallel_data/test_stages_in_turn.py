"""Reducers and gathers of one rank that has several pipeline stages, in random legal orders of their work."""

import pytest
from parallel_cases import EXACT, ROWS, plugins, reference, training
from staged_model import Staged, change, legal_order

from camshaft.testing.compare import assert_bit_equal, assert_within, compare
from camshaft.testing.run import record_ranks

STEPS = 4
VARIANTS = {"plain": {}, "frozen": {"frozen": ("layers.2.", "norm")}, "picky": {"picky": True}}


def run(make_recipe, row, ranks, seed, split, variant, shared=True, **more):
    hybrid = {"parallel": {"data_parallel_shard": 2}} if row.startswith("hybrid") else {}
    batch = {"micro_batch_size": 4 // ranks, "global_batch_size": 12}
    resolved = make_recipe(plugins(row, **more), ranks, batch=batch, training=training(STEPS), **hybrid)
    stages = Staged(legal_order(seed, 3, split), shared, **VARIANTS[variant])
    records = record_ranks(resolved, ranks, {"stages": stages})
    for other in records[1:]:
        assert_bit_equal(records[0], other)
    return records[0]


CASES = [
    *((row, 2, False, "plain") for row in ROWS if row != "none" and not row.startswith("hybrid")),
    *((row, 2, True, "picky") for row in ROWS if row != "none" and not row.startswith("hybrid")),
    ("ddp", 2, True, "frozen"),
    ("zero 2", 2, True, "frozen"),
    ("zero 3", 2, True, "frozen"),
    ("hybrid 2", 4, True, "plain"),
    ("hybrid 3", 4, True, "picky"),
    ("hybrid 1, optimizer along both", 4, False, "picky"),
    ("hybrid 3, optimizer along both", 4, True, "plain"),
]


@pytest.mark.parametrize(("row", "ranks", "split", "variant"), CASES)
def test_stages_in_any_order_make_what_one_process_makes(make_recipe, row, ranks, split, variant):
    wanted = reference(make_recipe, STEPS, variant, lambda model: change(model, **VARIANTS[variant]))
    seed = f"{row} {split} {variant}"
    assert_within(compare(run(make_recipe, row, ranks, seed, split, variant), wanted), EXACT)
