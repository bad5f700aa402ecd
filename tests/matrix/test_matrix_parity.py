"""Data-parallel family x tensor x pipeline x precision and optimizer: each is refused, or equals one plain process.

By default a third of a sample that has every pair of values; with CAMSHAFT_FULL_MATRIX=1 every combination on few ranks
besides, with CAMSHAFT_FULL_MATRIX=every all of them, and the page docs/parity.md is written from what was measured.
"""

import time
from itertools import combinations

import pytest
from matrix_cases import BATCH, CASES, DATA, NUMBERS, Combination, everything, pairs, promised, sample
from matrix_runs import recipe_of, refusal, train

from camshaft.data import prepare
from camshaft.recipe import check


def test_the_sample_has_every_pair_of_values_and_is_the_same_each_time():
    seen, wanted = ({pair for each in chosen for pair in pairs(each)} for chosen in (sample(), everything()))
    refused = {pair for each in everything() if not promised(each) for pair in pairs(each)}
    assert sample() == sample() and wanted - seen <= refused
    ours = {each for each in everything() if each.data not in ("deepspeed", "fully_shard")}
    assert len(ours) == 6 * 3 * 7 + (3 * 7 + 5 * (2 + 7)), "every triple in fp64; in bf16 those with a factor off"
    assert {pair for each in ours for pair in pairs(each)} <= seen, "pairs of our own that no case has"


@pytest.mark.parametrize("data", DATA)
def test_what_is_not_promised_is_refused_in_time_with_its_plugins_and_a_fix(make_recipe, data):
    for combination in (each for each in everything() if each.data == data):
        resolved = recipe_of(make_recipe, combination)
        began = time.perf_counter()
        problems = check(resolved, combination.ranks).problems
        assert time.perf_counter() - began < 1.0
        assert bool(problems) is not promised(combination), f"{combination}: {problems or 'not refused'}"
        if problems:
            assert all(problem.fix and problem.key for problem in problems), f"{combination}: {problems}"
            assert names_both(combination, map(str, problems)), f"{combination}: {problems}"


def names_both(combination, texts):
    """Whether one message names each of two plugins that do not go together."""
    named = (*combination.plugins, "precision")
    return any(sum(f"'{name}'" in text or f"plugins.{name}" in text for name in named) >= 2 for text in texts)


@pytest.mark.parametrize("pair", [*combinations(("ddp", "zero 2", "deepspeed"), 2)], ids=" and ".join)
def test_two_of_the_family_are_refused(make_recipe, pair):
    one, other = (DATA[name] for name in pair)
    resolved = make_recipe({"ddp": None, **one, **other, **NUMBERS["fp64 AdamW"][0], "clip": {"max_norm": 0.1}}, 2)
    problems = check(resolved, 2).problems
    both = [p for p in problems if all(f"'{name}'" in str(p) for name in (*one, *other))]
    assert both and all(problem.fix for problem in both), problems


def test_tokens_are_uneven(make_recipe):
    """Parity over equal samples would hide how sums over ranks and microbatches are weighted."""
    data = prepare(recipe_of(make_recipe, Combination("none", "-", "-", "fp64 SGD"))).train
    counts = {int((data.sample(index, 0)[1] >= 0).sum()) for index in range(BATCH)}
    assert len(counts) >= 4


@pytest.mark.parametrize("combination", CASES, ids=str)
def test_equals_one_plain_process(make_recipe, page, combination):
    assert refusal(make_recipe, combination) == ()
    page[combination] = train(make_recipe, combination)
