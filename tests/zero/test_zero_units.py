"""What travels together: the same for the plan and the run, and whatever is chosen, the same numbers."""

import pytest
import torch
from torch import nn
from zero_cases import assert_parity, reference, train

from camshaft.claims import Widths
from camshaft.estimate import Sizes
from camshaft.models.config import resolve
from camshaft.models.llama import Llama
from camshaft.models.presets import PRESETS
from camshaft.models.shapes import parameter_shapes
from camshaft.testing.ranks import RankFailed
from camshaft_zero import costs, grouping
from camshaft_zero.native import items_of
from camshaft_zero.options import Options

pytestmark = pytest.mark.broad


def described(groups):
    return [(group.name, group.items, group.modules, group.depth, group.encloses) for group in groups]


NESTED = {"units": ["model.layers.*", "model.layers.*.mlp", "model"]}
FEW = ("llama-tiny", "llama-3.2-1b")


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        *((preset, {}) for preset in PRESETS),
        *((preset, each) for preset in FEW for each in (NESTED, {"unit_size_mb": 300})),
    ],
    ids=str,
)
def test_the_plan_groups_as_the_run_does(preset, options):
    config = resolve(PRESETS[preset], 1024)
    with torch.device("meta"):
        model = Llama(config)
    shapes = tuple(parameter_shapes(config))
    elements = sum(each.elements for each in shapes)
    sizes = Sizes(elements, elements, 1, Widths(), 2, shapes)
    chosen, (items, frozen) = Options(stage=3, **options), items_of(model)
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    built = grouping.by_module(items, lists, chosen.units, int(chosen.unit_size_mb * 2**20 / 4))
    assert described(costs.plan_groups(chosen, sizes, divided=True)) == described(built) and not frozen
    assert sum(group.elements for group in built) == elements
    assert {name for group in built for name in group.modules} <= {name for name, _ in model.named_modules()}
    buckets = costs.plan_groups(Options(stage=1), sizes, divided=False)
    assert described(buckets) == described(grouping.buckets(items, 25, 4))


def test_blocks_and_large_modules_beside_them_are_units():
    items = [
        grouping.Item("embed.weight", 900, ("embed.weight",)),
        *(grouping.Item(f"blocks.{n}.weight", 1000, (f"blocks.{n}.weight",)) for n in range(4)),
        grouping.Item("norm.weight", 10, ("norm.weight",)),
        grouping.Item("head.weight", 249, ("head.weight",)),
    ]
    names = [group.name for group in grouping.by_module(items, ["blocks"], None, 0)]
    assert names == ["", "embed", "blocks.0", "blocks.1", "blocks.2", "blocks.3"], "the head is under a quarter"
    tied = [grouping.Item("embed.weight", 900, ("embed.weight", "head.weight")), *items[1:-1]]
    joined = grouping.by_module(tied, ["blocks"], None, 1500)
    modules = [[""], ["blocks.0", "blocks.1"], ["blocks.2", "blocks.3"]]
    assert [group.modules for group in joined] == modules, "what two modules share belongs to what is around both"


def test_slots_alternate_and_what_is_around_others_has_its_own():
    names = [("a", 0, True), ("a.b", 1, False), ("a.c", 1, False), ("d", 0, False), ("e", 0, False), ("f", 0, False)]
    groups = [grouping.Group(name, [], depth=depth, encloses=encloses) for name, depth, encloses in names]
    keys = grouping.slots(groups, prefetch=1, reshard=True)
    assert keys[1] != keys[2] and keys[3] == keys[5] != keys[4] and len(set(keys)) == 5
    assert len(set(grouping.slots(groups, prefetch=1, reshard=False))) == 6
    assert len(set(grouping.slots(groups[3:], prefetch=2, reshard=True))) == 3


STEPS = 6
CHOICES = [
    NESTED,
    {"units": ["model.layers.*", "model.layers.*.*", "model.layers.*.*.*"], "prefetch": 3, "reduce": "last"},
    {"units": ["model.layers.[02]"]},
    {"units": ["model.layers.?.mlp", "model.layers.?.self_attn", "model.embed_tokens"], "prefetch": 2},
    {"unit_size_mb": 0.06},
    {"unit_size_mb": 10, "reduce": "last"},
    {"prefetch": 0},
    {"prefetch": 5},
    {"prefetch": 2, "reshard_after_forward": False},
    {"overlap": False},
]


@pytest.mark.parametrize("options", CHOICES, ids=str)
def test_units_and_prefetching_change_nothing(make_recipe, options):
    records = train(make_recipe, "3", 2, 3, steps=STEPS, **options)[0]
    assert_parity(records, reference(make_recipe, steps=STEPS), "fp64")


@pytest.mark.parametrize("options", [{}, {"reshard_after_forward": False}], ids=["resharded", "kept"])
def test_one_block_is_enough(make_recipe, options):
    model = make_recipe({}).tree["model"] | {"num_hidden_layers": 1, "tie_word_embeddings": False}
    alone = train(make_recipe, "replicate", 1, 1, steps=STEPS, sections={"model": model})[0]
    assert_parity(train(make_recipe, "3", 2, 3, steps=STEPS, sections={"model": model}, **options)[0], alone, "fp64")


def test_more_ranks_than_elements(make_recipe):
    """Of a gain of 3 elements on 4 ranks; nothing but padding is on some."""
    records = train(make_recipe, "3", 4, 1, variant="only a scalar", steps=STEPS)[0]
    assert_parity(records, reference(make_recipe, variant="only a scalar", steps=STEPS), "fp64")


@pytest.mark.parametrize(
    ("row", "options", "reason"),
    [
        (
            "1",
            {"bucket_size_mb": 100, "overlap": True},
            "zero.overlap: there is nothing to overlap.*lower plugins.zero.b",
        ),
        ("2", {"bucket_size_mb": 100, "overlap": True}, r"zero\..*: all gradients fit into one bucket, of 0"),
        ("3", {"units": ["model.layers.*", "nothing.*"]}, r"zero.units.1: the pattern 'nothing\.\*' matches no module"),
    ],
)
def test_what_has_no_effect_on_this_model_ends_the_run(make_recipe, row, options, reason):
    with pytest.raises(RankFailed, match=f"plugins.{reason}"):
        train(make_recipe, row, 2, 1, steps=STEPS, **options)


def test_one_bucket_is_fine_where_nobody_asked_for_overlap(make_recipe):
    records = train(make_recipe, "1", 2, 3, steps=STEPS, bucket_size_mb=100)[0]
    assert_parity(records, reference(make_recipe, steps=STEPS), "fp64")


@pytest.mark.parametrize(
    ("count", "largest_mb", "per_bucket"),
    [(32, 25, 8), (200, 25, 25), (8, 25, 4), (2, 25, 2), (32, 2, 2)],
)
def test_a_model_of_few_buckets_is_cut_into_shares(count, largest_mb, per_bucket):
    """Parameters of 1 MiB: at least four buckets, but none below 4 MiB for that, and never above what was asked for."""
    items = [grouping.Item(f"p{number}", 2**18, (f"p{number}",)) for number in range(count)]
    found = grouping.buckets(items, largest_mb, 4)
    assert len(found[0].items) == per_bucket and sum(len(group.items) for group in found) == count
