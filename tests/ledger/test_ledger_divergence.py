"""Ranks that call something else than their peers are named within seconds; ranks that are slow are left alone."""

import json

import pytest
from broken_plugin import STEP, run

from camshaft.testing.ranks import RankFailed, run_ranks

PLUGINS = {"ddp": {}, "sgd": {"lr": 1e-3}, "ledger": {}}
LIMIT_S = 10.0


def found_out(make_recipe, tmp_path, world_size, kind, plugins=PLUGINS, sections=None, **options):
    """What every rank said, after checking that all of them ended, in time."""
    resolved = make_recipe(plugins, world_size, accumulation=1, **(sections or {}))
    arguments = (resolved, kind, str(tmp_path), *(options.get(name, default) for name, default in DEFAULTS.items()))
    with pytest.raises(RankFailed) as caught:
        run_ranks(world_size, run, *arguments, timeout_s=60)
    assert (tmp_path / "began").exists(), str(caught.value)
    began = float((tmp_path / "began").read_text())
    texts = []
    for rank in range(world_size):
        path = tmp_path / str(rank)
        assert path.exists(), f"rank {rank} ended without a word"
        name, text, when = json.loads(path.read_text())
        assert name == "RanksDiverged", text
        assert when - began < LIMIT_S, f"rank {rank} took {when - began:.1f} s"
        texts.append(text)
    assert len(set(texts)) == 1, texts
    return texts[0]


DEFAULTS = {"wrong": 1, "step": STEP, "board": True}

CASES = {  # what is said of a run with ``Broken`` after ddp: the calls before are two of the core and one of ddp
    "skip": "rank 1, plugin x, hook reduce: left out call 5 all_reduce on dp, which rank 0 did, and went on to call 5",
    "op": "rank 1, plugin x, hook reduce: call 5 broadcast on dp; rank 0 did all_reduce on dp (step 3)",
    "size": "rank 1, plugin x, hook reduce: call 5 all_reduce of 11 float32 on dp; rank 0 did all_reduce of 10 float32",
    "gather": "rank 1, plugin x, hook reduce: call 5 all_gather of {} float32 on dp; rank 0 did all_gather of {} ",
    "dtype": "rank 1, plugin x, hook reduce: call 5 all_reduce of 10 float64 on dp; rank 0 did all_reduce of 10 float3",
    "hook": "rank 1, plugin x, hook clip: call 5 all_reduce on dp; rank 0 did all_reduce on dp (plugin x, hook reduce)",
}


@pytest.mark.parametrize(("kind", "world_size"), [*((kind, 2) for kind in CASES), ("skip", 3), ("size", 3)])
def test_a_wrong_call_is_named_before_it_is_sent(make_recipe, tmp_path, kind, world_size):
    text = found_out(make_recipe, tmp_path, world_size, kind)
    assert text.startswith(CASES[kind].format(11 * world_size, 10 * world_size)), text


@pytest.mark.parametrize(("kind", "world_size"), [("op", 2), ("gather", 3)])
def test_ranks_that_wait_in_vain_find_out_over_their_store_alone(make_recipe, tmp_path, kind, world_size):
    """As on several nodes, where ranks share no memory: only once they hang."""
    text = found_out(make_recipe, tmp_path, world_size, kind, board=False)
    assert text.startswith(CASES[kind].format(11 * world_size, 10 * world_size)), text


def test_a_difference_that_does_not_hang_is_found_by_the_hashes(make_recipe, tmp_path):
    text = found_out(make_recipe, tmp_path, 2, "hook", board=False)
    assert text.startswith(CASES["hook"]), text


def test_another_axis_is_named(make_recipe, tmp_path):
    hybrid = {"parallel": {"data_parallel_replicate": 1, "data_parallel_shard": 2}}
    text = found_out(make_recipe, tmp_path, 2, "axis", sections=hybrid)
    assert text.startswith(
        "rank 1, plugin x, hook reduce: call 5 all_reduce on dp_shard; rank 0 did all_reduce on dp "
    ), text


def test_rank_0_is_named_when_it_is_the_one(make_recipe, tmp_path):
    text = found_out(make_recipe, tmp_path, 3, "op", wrong=0, step=1)
    assert text.startswith("rank 0, plugin x, hook reduce: call 4 broadcast on dp; rank 1 did all_reduce on dp"), text


def test_of_two_ranks_the_one_is_wrong_that_did_otherwise_before(make_recipe, tmp_path):
    text = found_out(make_recipe, tmp_path, 2, "skip", wrong=0)
    assert text.startswith("rank 0, plugin x, hook reduce: left out call 5 all_reduce on dp, which rank 1 did"), text


def test_a_call_too_many_is_named(make_recipe, tmp_path):
    text = found_out(make_recipe, tmp_path, 2, "extra")
    assert text.startswith("rank 1, plugin x, hook reduce: call 6 all_reduce of 7 float32 on dp; rank 0 did"), text


def test_a_plugin_that_goes_past_the_channels_is_named_too(make_recipe, tmp_path):
    text = found_out(make_recipe, tmp_path, 2, "raw")
    assert text.startswith("rank 1, plugin x, hook reduce: left out call 5 all_reduce on dp, which rank 0 did"), text


def test_a_call_left_out_in_the_last_step_is_named_though_the_run_ends(make_recipe, tmp_path):
    text = found_out(make_recipe, tmp_path, 2, "last", step=20)
    assert text.startswith("rank 1, plugin x, hook reduce: left out call 5 all_reduce on dp, which rank 0 did"), text


def test_a_slow_rank_is_left_alone(make_recipe, tmp_path):
    plugins = {**PLUGINS, "ledger": {"stall_s": 0.5}}
    resolved = make_recipe(plugins, 2, accumulation=1)
    assert run_ranks(2, run, resolved, "slow", str(tmp_path), timeout_s=60) == [20, 20]
    assert (tmp_path / "began").exists(), "nobody was slow"
