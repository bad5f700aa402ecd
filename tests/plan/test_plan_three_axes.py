"""The recipe for 64 GPUs, planned completely on this machine, and larger worlds."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from camshaft.cli import estimate, run
from camshaft.cli import ranks as pages
from camshaft.host import Host
from camshaft.recipe import check, load

RECIPE = Path(__file__).parents[2] / "recipes" / "llama3_8b_64gpu.yaml"
LARGE = (
    "parallel.data_parallel=auto", "parallel.tensor_parallel=8", "parallel.pipeline_parallel=16",
    "plugins.pipeline.virtual_stages=2", "batch.global_batch_size=2048",
)  # fmt: skip


@pytest.fixture(scope="module")
def recipe():
    resolved = load(RECIPE)
    return check(resolved, 64).require(), Host.of(resolved.recipe.plugins)


def test_the_ranks_of_one_copy_hold_every_parameter_once(recipe):
    checked, host = recipe
    copy = [rank for rank in range(64) if checked.mesh.coordinates(rank)["dp"] == 3]
    sizes = [estimate.sizes(checked, host, rank) for rank in copy]
    assert sum(e.elements / e.copies for found in sizes for e in found.parameters) == 8_030_261_248
    layers = {each.layer for found in sizes for each in found.parameters}
    assert len(copy) == 8 and layers == set(range(-1, 33))
    assert all(found.elements < 8_030_261_248 / 8 * 1.03 for found in sizes)


def test_state_is_that_of_zero_1_on_the_ranks_own_elements(recipe):
    """fp32: 4 + 4 bytes of each element, and 8 of an eighth of them."""
    checked, host = recipe
    for rank in (0, 37, 63):
        elements = estimate.sizes(checked, host, rank).elements
        state = estimate.estimate(checked, host, rank).state
        assert state.total == 8 * elements + 8 * -(-elements // 8)


def test_traffic_of_each_axis_is_its_formula(recipe):
    """Of the last place along ``pp``, which has no embedding: 32 microbatches of 8,192 tokens, 4,096 wide."""
    checked, host = recipe
    found = estimate.estimate(checked, host, 37)
    sums = {}
    for entry in found.sent:
        sums[entry.axis, entry.op] = sums.get((entry.axis, entry.op), 0) + entry.bytes
    layers = len({e.layer for e in estimate.sizes(checked, host, 37).parameters} - {32})
    hidden, microbatches, share = 8192 * 4096, 32, 3 / 4
    # Two regions and two products by rows in a layer, and the region of the head, each there and back in bf16.
    passages = 4 * layers + 1
    assert sums["tp", "all_gather"] == sums["tp", "reduce_scatter"] == passages * microbatches * share * hidden * 2
    # Eight stages on two ranks in turn: this rank's four send over seven of fourteen ways, a quarter of the tokens.
    assert sums["pp", "send"] == 7 * microbatches * hidden / 4 * 4
    elements = estimate.sizes(checked, host, 37).elements
    assert sums["dp", "reduce_scatter"] == pytest.approx(7 / 8 * elements * 4, rel=1e-4)


def test_plan_prints_who_holds_and_sends_what_on_any_rank(capsys):
    assert run(["plan", str(RECIPE), "--rank", "37"]) == 0
    text = capsys.readouterr().out
    assert "mesh         pp 2 x dp 8 x cp 1 x tp 4 = 64 rank(s)" in text and "rank 37 of 64\n" in text
    for words in ("along pp  5, 37 (2)", "along dp  33, 37, 41, 45, 49, 53, 57, 61 (8)", "along tp  36..39 (4)"):
        assert words in text
    for words in ("sent by rank 37 in a step", "schedule interleaved_1f1b: 8 stages on 2 ranks", "RECV_F0@1 F0@1"):
        assert words in text
    assert run(["plan", str(RECIPE)]) == 0
    text = capsys.readouterr().out
    assert "by place along pp" in text and "last norm and head" in text and "which holds most" in text


def test_4096_ranks_on_three_axes_are_planned_without_torch_in_seconds():
    words = ["plan", str(RECIPE), "--world-size", "4096", *LARGE]
    code = (
        "import sys, time; from camshaft.cli import run\n"
        f"assert run({words!r}) == 0\n"
        "assert 'torch' not in sys.modules\n"
        "print('seconds', time.process_time())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
    assert "pp 16 x dp 32 x cp 1 x tp 8 = 4096 rank(s)" in done.stdout
    assert float(done.stdout.rsplit("seconds ", 1)[1]) < 5


def test_16384_ranks_are_counted_by_the_places_that_differ():
    resolved = load(RECIPE, (*LARGE, "batch.global_batch_size=8192"), world_size=16384)
    ranks = pages.Ranks(check(resolved, 16384).require(), Host.of(resolved.recipe.plugins))
    began = time.process_time()
    assert len(ranks.representatives) == 128 and time.process_time() - began < 5
