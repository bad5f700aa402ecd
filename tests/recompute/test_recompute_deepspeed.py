"""Recomputation inside of DeepSpeed's engine changes no bit either."""

import pytest
from recompute_cases import MODES, assert_same, train


@pytest.fixture(scope="module", autouse=True)
def loaded():
    """DeepSpeed is imported once, before ranks are forked: it takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        from camshaft_deepspeed.runtime import load

        load()


@pytest.mark.parametrize("stage", [2, 3])
def test_the_provider(make_recipe, stage):
    plugins = {"ddp": None, "deepspeed": {"stage": stage, "reduce_bucket_size": 3000}}
    wanted = train(make_recipe, 2, plugins=plugins)
    for mode in ("full", "selective"):
        assert_same(train(make_recipe, 2, MODES[mode], plugins=plugins), wanted)
