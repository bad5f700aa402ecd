"""What a budget keeps: as much time saved as the bytes allow, equal on all ranks."""

import random
from itertools import combinations, product
from types import SimpleNamespace

import pytest
import torch
from recompute_cases import Builds, Wet, recipe
from test_recompute_bytes import GIB, measured

from camshaft.comm import Channel
from camshaft.plugin import Plugin, hookimpl
from camshaft.testing.ranks import run_ranks
from camshaft_recompute.choice import Cost, best
from camshaft_recompute.region import Region
from camshaft_recompute.runtime import Runtime

HUGE = Cost(10**9, 1.0)
"""Of a module that cannot be left as it is."""


def total(modules, wholes, kept):
    """(bytes, seconds) of a choice."""
    costs = [
        cost
        for place, choice in enumerate(kept)
        for cost in ([wholes[place]] if choice is None else [modules[place][number] for number in choice])
    ]
    return sum(each.bytes for each in costs), sum(each.seconds for each in costs)


def optimum(modules, wholes, budget):
    """By trying everything."""
    each = [
        [None, *(frozenset(some) for count in range(len(costs) + 1) for some in combinations(range(len(costs)), count))]
        for costs in modules
    ]
    found = (total(modules, wholes, kept) for kept in product(*each))
    return max(seconds for size, seconds in found if size <= budget)


@pytest.mark.parametrize("seed", range(20))
def test_choice_is_within_one_result_of_the_best(seed):
    chooser = random.Random(seed)
    modules = [
        [Cost(chooser.randint(0, 40), chooser.choice([0.0, chooser.random()])) for _ in range(chooser.randint(1, 5))]
        for _ in range(2)
    ]
    wholes = [
        Cost(sum(each.bytes for each in costs) * 2 // 3, sum(each.seconds for each in costs)) for costs in modules
    ]
    if seed % 2:
        wholes = [HUGE] * 2
    budget = chooser.randint(0, 120)
    kept = best(modules, wholes, budget)
    size, seconds = total(modules, wholes, kept)
    most = max(cost.seconds for costs in ([*modules, wholes] if wholes[0] is not HUGE else modules) for cost in costs)
    assert size <= budget
    assert optimum(modules, wholes, budget) - most <= seconds <= optimum(modules, wholes, budget) + 1e-12
    assert kept == best(modules, wholes, budget), "the same each time"
    assert not any(modules[place][number].seconds == 0 for place, some in enumerate(kept) for number in some or ())


def test_everything_fits_a_large_budget_and_nothing_a_budget_of_none():
    modules = [[Cost(5, 1.0), Cost(7, 0.5), Cost(9, 0.0)]] * 3
    wholes = [Cost(12, 1.5)] * 3
    assert best(modules, [HUGE] * 3, 36) == [frozenset({0, 1})] * 3
    assert best(modules, wholes, 0) == best(modules, wholes, -10) == [frozenset()] * 3
    assert best(modules, wholes, 16) == [frozenset({0})] * 3, "densest first, whatever the module"
    assert best([[Cost(10, 1.0), Cost(5, 0.9), Cost(5, 0.8)]], [HUGE], 10) == [frozenset({1, 2})], (
        "not the longest first"
    )
    cheaper = [Cost(9, 1.6)] * 3
    assert best(modules, cheaper, 27) == [None] * 3 and best(modules, cheaper, 14).count(None) == 1


@pytest.mark.parametrize("budget", [0, 60_000, 150_000, 10_000_000])
def test_a_run_keeps_no_more_than_its_budget(make_recipe, budget):
    resolved = recipe(make_recipe, 1, {"budget_bytes": budget})
    plain = recipe(make_recipe, 1, None)
    ((without, _, _),) = run_ranks(1, measured, plain, {"builds": Builds(Wet)}, timeout_s=60)
    ((held, extras, lines),) = run_ranks(1, measured, resolved, {"builds": Builds(Wet)}, timeout_s=60)
    assert without[-1] - held[-1] == extras["plugin/recompute/saved_gib"] * GIB
    kept = extras["plugin/recompute/kept_gib"] * GIB
    inputs = 36 * 1024
    if budget < inputs:
        assert kept == inputs and "inputs alone are 36 KiB, more than the budget of 0 B" in lines[1]
        assert extras["plugin/recompute/extra_share"] == 1.0
        return
    again = int(lines[0].rpartition(" operations more")[0].rpartition(" ")[2])
    assert (again == 0) == (budget == 10_000_000), "of what is kept nothing runs again"
    assert inputs < kept <= budget and len(lines) == 1
    # Chosen by measured times: with little room, what is kept may be what costs time and no product.
    assert extras["plugin/recompute/extra_share"] <= 1.0
    assert extras["plugin/recompute/extra_share"] < 1.0 or budget < 100_000
    if budget == 10_000_000:
        assert extras["plugin/recompute/extra_tflops"] == 0.0 and held[-1] == without[-1], "all is left as it is"
    else:
        assert kept > budget - 17_000, "no result that could be kept is larger than what is left"


def agreed(rank, world_size, own):
    peers = Channel(torch.distributed.group.WORLD, "recompute", "dp")
    return Runtime._agreed(SimpleNamespace(_peers=peers, _world=SimpleNamespace(device=torch.device("cpu"))), own[rank])


def test_ranks_agree_on_the_largest_costs_and_on_none_where_they_ran_other_operations():
    """Kept results are numbered: the same numbers would mean other operations."""
    one, other = [[Cost(8, 0.5), Cost(2, 0.1)], [Cost(3, 0.2)]], [[Cost(4, 0.7), Cost(2, 0.3)], [Cost(5, 0.1)]]
    largest = [[Cost(8, 0.7), Cost(2, 0.3)], [Cost(5, 0.2)]]
    assert run_ranks(2, agreed, [one, other], timeout_s=60) == [largest, largest]
    found = run_ranks(2, agreed, [one, [[Cost(4, 0.7)], [Cost(5, 0.1)]]], timeout_s=60)
    assert found == [[[Cost(2**62, 0.0)], [Cost(2**62, 0.0)]]] * 2


class Tells(Plugin):
    """What each module keeps, in the end."""

    def __init__(self):
        super().__init__()
        self.places = None

    @hookimpl
    def post_step(self, state):
        owners = [getattr(module.forward, "__self__", None) for module in state.model.modules()]
        regions = [each for each in owners if isinstance(each, Region)]
        self.places = {each.name: sorted(each.keeper.places) if each.keeper else [] for each in regions}


def places(rank, world_size, resolved):
    tells = Tells()
    measured(rank, world_size, resolved, {"tells": tells, "builds": Builds(Wet)})
    return tells.places


@pytest.mark.parametrize(
    "plugins",
    [{"zero": {"stage": 3}}, {"tensor_parallel": {}}],
    ids=["zero 3", "tp"],
)
def test_all_ranks_choose_alike(make_recipe, plugins):
    parallel = {"tensor_parallel": 2} if "tensor_parallel" in plugins else {}
    options = {"budget_bytes": 90_000}
    resolved = recipe(make_recipe, 2, options, plugins={"ddp": None, **plugins}, parallel=parallel)
    one, other = run_ranks(2, places, resolved, timeout_s=100)
    assert one == other and len(one) == 4 and any(one.values())
