"""What `zero` refuses before anything is built: each fault under its key, with a way out."""

import pytest
from zero_cases import BOTH, plugins

from camshaft.recipe import check

HYBRID = {"data_parallel_shard": 2}
CASES = [
    # (options of zero, parallel, key after "plugins.zero", message, fix)
    ({}, {}, "", "says nothing of what to divide", "set plugins.zero.stage=1, 2 or 3"),
    (
        {"stage": 1, "optimizer": "shard"},
        {},
        ".optimizer",
        "`stage` says what is divided, and so does `optimizer`",
        "rem",
    ),
    (
        {"stage": 3, "gradients": {"dp": "shard"}},
        {},
        ".gradients",
        "and so does `gradients`",
        "remove one of plugins.zer",
    ),
    (
        {"parameters": "shard"},
        {},
        ".gradients",
        "parameters, but not gradients, along 'dp'",
        "set plugins.zero.optimizer=shard, and",
    ),
    (
        {"gradients": "shard"},
        {},
        ".optimizer",
        "gradients, but not the optimizer",
        "set plugins.zero.optimizer=shard, and",
    ),
    ({"optimizer": {"dp_shard": "shard"}}, {}, ".optimizer", "there is no data axis 'dp_shard' here", "use dp"),
    ({"optimizer": {"dp": "shard"}}, HYBRID, ".optimizer", "no data axis 'dp' here", "use dp_replicate, dp_shard"),
    ({"optimizer": {"tp": "shard"}}, {}, ".optimizer", "there is no data axis 'tp' here", "use dp"),
    (
        {"parameters": "replicate"},
        HYBRID,
        ".optimizer",
        "divides nothing along 'dp_shard'",
        "plugins.zero.optimizer=sha",
    ),
    (
        {"parameters": "shard", "gradients": {**BOTH}, "optimizer": {**BOTH}},
        HYBRID,
        ".gradients",
        "divides gradients along 'dp_replicate', the axis of copies",
        "raise parallel.data_parallel_shard instead",
    ),
    (
        {"parameters": {**BOTH}, "gradients": {**BOTH}, "optimizer": {**BOTH}},
        HYBRID,
        ".parameters",
        "divides parameters along 'dp_replicate'",
        "only the optimizer can be divided along both",
    ),
    (
        {"optimizer": {"dp_replicate": "shard"}},
        HYBRID,
        ".optimizer",
        "divides nothing along 'dp_shard'",
        "remove parall",
    ),
    (
        {"stage": 1, "reduce": "each"},
        {},
        ".reduce",
        "gradients are replicated",
        "remove it, or set plugins.zero.stage=2",
    ),
    ({"stage": 1, "units": ["a"]}, {}, ".units", "parameters are not divided", "or use plugins.zero.stage=3"),
    ({"stage": 2, "unit_size_mb": 1}, {}, ".unit_size_mb", "has no effect: parameters are not divided", "remove it"),
    ({"stage": 2, "prefetch": 1}, {}, ".prefetch", "has no effect", "remove it"),
    ({"stage": 2, "reshard_after_forward": True}, {}, ".reshard_after_forward", "has no effect", "remove it"),
    ({"stage": 3, "bucket_size_mb": 1}, {}, ".bucket_size_mb", "units are modules", "or use unit_size_mb"),
    (
        {"stage": 3, "prefetch": 2, "overlap": False},
        {},
        ".prefetch",
        "without overlap nothing is gathered ahead",
        "remo",
    ),
    ({"stage": 1, "provider": "torch"}, {}, ".provider", "provider: torch divides gradients and optimizer", "native"),
    (
        {"parameters": "shard", "gradients": "shard", "optimizer": BOTH, "provider": "torch"},
        HYBRID,
        ".provider",
        "along the axis of shards only",
        "set plugins.zero.provider=native",
    ),
    (
        {"stage": 3, "provider": "torch", "prefetch": 2},
        {},
        ".prefetch",
        "provider: torch decides it",
        "provider=native",
    ),
    (
        {"stage": 2, "provider": "torch", "overlap": True},
        {},
        ".overlap",
        "provider: torch decides it",
        "provider=native",
    ),
    (
        {"stage": 1},
        {"data_parallel": 1},
        "",
        "'zero' divides over the data axis, and the recipe gives that axis one",
        "au",
    ),
]


def problems(make_recipe, zero, parallel, ranks):
    resolved = make_recipe(plugins(zero), ranks, accumulation=1, parallel=parallel)
    return check(resolved, ranks).problems


@pytest.mark.parametrize(("zero", "parallel", "key", "message", "fix"), CASES)
def test_each_fault_has_its_key_and_a_fix(make_recipe, zero, parallel, key, message, fix):
    ranks = 4 if parallel is HYBRID else parallel.get("data_parallel", 2)
    found = problems(make_recipe, zero, parallel, ranks)
    (problem,) = [each for each in found if message in each.message]
    assert problem.key == f"plugins.zero{key}" and fix in problem.fix
    assert all(each.key.startswith("plugins.zero") for each in found)


@pytest.mark.parametrize(
    ("zero", "parallel"),
    [
        ({"stage": 1}, {}),
        ({"stage": 2, "reduce": "last"}, {}),
        ({"stage": 3, "units": ["model.layers.*"], "prefetch": 0, "overlap": False}, {}),
        ({"stage": 3, "provider": "torch", "reduce": "last", "reshard_after_forward": False}, {}),
        ({"optimizer": {"dp": "shard"}}, {}),
        ({"parameters": "replicate"}, {}),
        ({"stage": 3}, HYBRID),
        ({"parameters": "shard", "gradients": {"dp_shard": "shard"}, "optimizer": BOTH}, HYBRID),
    ],
)
def test_what_is_legal_is_not_refused(make_recipe, zero, parallel):
    assert problems(make_recipe, zero, parallel, 4 if parallel else 2) == ()


def test_two_owners_of_gradients_are_refused_with_both_names(make_recipe):
    resolved = make_recipe({**plugins({"stage": 1}), "ddp": {}}, 2, accumulation=1)
    found = check(resolved, 2).problems
    assert found and all("ddp" in each.message and "zero" in each.message for each in found)
