"""Models that are not a list of blocks: what each placement can train is right, the rest ends with a clear error."""

import pytest
from zero_cases import assert_parity, reference, train

from camshaft.testing.ranks import RankFailed

pytestmark = pytest.mark.broad

STEPS = 6


def assert_trains(make_recipe, row, variant, ranks=2, **options):
    records = train(make_recipe, row, ranks, 2, variant=variant, steps=STEPS, **options)[0]
    assert_parity(records, reference(make_recipe, variant=variant, steps=STEPS), "fp64")


SOUND = (
    *("looped", "shared block", "scalars", "only a scalar", "no list", "never called"),
    *("recomputes layers", "recomputes inside"),
)


@pytest.mark.parametrize(
    ("row", "variant"), [*(("3", each) for each in SOUND), *(("1", each) for each in SOUND[2:]), ("2", "looped")]
)
def test_odd_models_train(make_recipe, row, variant):
    assert_trains(make_recipe, row, variant)


@pytest.mark.parametrize(("row", "variant"), [("1", "reads ahead"), ("2", "reads back"), ("2", "calls back")])
def test_modules_may_reach_into_others_where_parameters_are_whole(make_recipe, row, variant):
    assert_trains(make_recipe, row, variant)


@pytest.mark.parametrize("variant", ["reads ahead", "reads back"])
def test_a_weight_that_is_not_there_is_never_read_in_silence(make_recipe, variant):
    with pytest.raises(RankFailed, match=r"NonFiniteLoss|after the backward of its unit was over"):
        train(make_recipe, "3", 2, 2, variant=variant, steps=STEPS)


def test_modules_inside_of_each_other_that_share_a_buffer_are_refused_and_have_ways_out(make_recipe):
    with pytest.raises(RankFailed, match=r"'model\.layers\.0' is needed while 'model\.layers\.2' still is") as refused:
        train(make_recipe, "3", 2, 2, variant="calls back", steps=STEPS)
    assert "plugins.zero.reshard_after_forward=false, or plugins.zero.provider=torch" in str(refused.value)
    assert_trains(make_recipe, "3 kept", "calls back")
    assert_trains(make_recipe, {"stage": 3, "provider": "torch"}, "calls back")


@pytest.mark.parametrize("row", ["1", "2", "3"])
def test_a_gradient_that_comes_twice_is_refused_and_not_lost(make_recipe, row):
    """A sum that began without it would be wrong; alone nothing is sent, and it is added up."""
    with pytest.raises(RankFailed, match=r"the gradient of 'model\.layers\.1\.mlp.*use use_reentrant=False"):
        train(make_recipe, row, 2, 2, variant="reentrant", steps=STEPS)
    assert_trains(make_recipe, row, "reentrant", ranks=1)
