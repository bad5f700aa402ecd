"""Every row of the family against one plain process: gradients, norm, weights, optimizer state and loss of each step.

Tokens are uneven, the last window is short, clipping is active in every step. With CAMSHAFT_FULL_MATRIX=1 the complete
product of all factors runs, over 20 steps each, and a table of the worst deviations is printed.
"""

import random
from dataclasses import replace
from itertools import combinations, product

import pytest
from zero_cases import BOUNDS, FULL, HYBRID, ROWS, VARIANTS, assert_parity, global_batch, reference, train

from camshaft.testing.compare import assert_bit_equal, assert_within, compare

SEED = 91
PAPER = ("1", "2", "3")
"""Rows that see every number of ranks and every variant of the model in the sample."""


def everything():
    for row, compute, accumulation, variant, optimizer in product(
        ROWS, ("fp64", "fp32"), (1, 4), VARIANTS, ("adamw", "sgd")
    ):
        for ranks in (4,) if row in HYBRID else (1, 2, 3, 4):
            yield row, ranks, compute, accumulation, variant, optimizer


def sample(seed=SEED):
    """Each row with both values of each factor that has two, those of the paper with all values of all factors.

    What stands together in a case is shuffled; with this seed every pair of values of two factors occurs.
    """
    chooser = random.Random(seed)
    for row in ROWS:
        count = 4 if row in PAPER else 2
        columns = [
            [4] * count if row in HYBRID else chooser.sample((1, 2, 3, 4), count),
            *(chooser.sample(values * (count // 2), count) for values in (("fp64", "fp32"), (1, 4))),
            chooser.sample(list(VARIANTS), count),
            chooser.sample(("adamw", "sgd") * (count // 2), count),
        ]
        for case in zip(*columns, strict=True):
            yield (row, *case)


CASES = list(everything() if FULL else sample())


def test_the_sample_sees_each_value_with_each_row():
    for row in ROWS:
        seen = [set(values) for values in zip(*(case[1:] for case in sample() if case[0] == row), strict=True)]
        assert [len(values) for values in seen[1:3]] == [2, 2] and len(seen[4]) == 2, row
        if row in PAPER:
            assert seen[0] == {1, 2, 3, 4} and seen[3] == set(VARIANTS)
    factors = [(1, 2, 3, 4), ("fp64", "fp32"), (1, 4), VARIANTS, ("adamw", "sgd")]
    for one, other in combinations(range(5), 2):
        together = {(case[1 + one], case[1 + other]) for case in sample()}
        assert together == set(product(factors[one], factors[other])), "pairs that no case has"


@pytest.fixture(scope="module")
def table():
    """Worst deviation of each row, compute and quantity; printed at the end of the complete product."""
    worst = {}
    yield worst
    if FULL:
        for (row, compute), found in sorted(worst.items()):
            print(f"\n{row:32} {compute}", *(f"{key} {value:.1e}" for key, value in found.items()), end="")


@pytest.mark.parametrize(("row", "ranks", "compute", "accumulation", "variant", "optimizer"), CASES)
def test_equals_one_plain_process(make_recipe, table, row, ranks, compute, accumulation, variant, optimizer):
    steps = 20 if FULL or (row in PAPER and ranks == 2) else 6
    case = {"optimizer": optimizer, "compute": compute, "variant": variant, "steps": steps}
    records = train(make_recipe, row, ranks, accumulation, **case)[0]
    found = assert_parity(records, reference(make_recipe, global_batch(ranks, accumulation), **case), compute)
    entry = table.setdefault((row, compute), dict.fromkeys(found, 0.0))
    entry.update({key: max(value, found[key]) for key, value in entry.items()})


def test_some_parameters_are_used_by_some_windows_microbatches_and_ranks_only(make_recipe):
    """Else the variant would not try what it is there for."""
    wanted = reference(make_recipe, variant="picky")
    unused = {name for record in wanted for name, gradient in record.gradients.items() if gradient is None}
    assert unused == {"model.norm.gain", "model.layers.0.mlp.gain"}
    assert all(wanted[0].gradients[name] is not None for name in unused)


EQUAL = ("replicate", "1", "2 last", "3 last", "ddp")


@pytest.mark.parametrize("world_size", [2, 3])
def test_sums_in_the_same_order_are_equal_in_every_bit(make_recipe, world_size):
    """Ranks are added in ascending order in all stages; on 2 ranks a + b is b + a, so that ddp's own order agrees.

    Of the first step: optimizers' kernels round otherwise in the last few elements of a tensor, which are others in
    each layout, so that later gradients are of other weights.
    """
    rows = EQUAL if world_size == 2 else EQUAL[1:4]
    runs = [train(make_recipe, row, world_size, 4, compute="fp32", variant="picky", steps=5)[0] for row in rows]
    for records in runs:
        assert_bit_equal([gradients_only(records[0])], [gradients_only(runs[0][0])])
        assert_within(compare(records, runs[0]), BOUNDS["fp32"])


def gradients_only(record):
    return replace(record, norm=None, weights={}, optimizer={})
