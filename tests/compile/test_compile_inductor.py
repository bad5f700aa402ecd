"""Kernels of inductor: the numbers of uncompiled runs within the dtype's rounding. Slow to compile, so tiny."""

from pathlib import Path

import pytest
from compile_cases import Seen, assert_within, compare, recipe, records_of, run

SMALL = {"num_hidden_layers": 2}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One folder of compiled code for all tests here."""
    return str(tmp_path_factory.mktemp("inductor"))


@pytest.mark.parametrize(
    ("compute", "bounds"),
    [
        # Sums in another order: some units in the last place of fp32 (6e-8), larger where Adam divides small by small.
        ("fp32", {"gradients": 1e-4, "norm": 1e-5, "weights": 1e-4, "loss": 1e-6}),
        # Inductor rounds to bf16 (4e-3) at fewer places than the uncompiled run.
        ("bf16", {"gradients": 0.1, "norm": 2e-2, "weights": 2e-2, "loss": 1e-3}),
    ],
)
def test_numbers_of_the_uncompiled_run(compute, bounds, cache, make_recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    plain = run(recipe(make_recipe, 1, compute=compute, model=SMALL))
    options = {"strict": True, "fullgraph": True, "cache_dir": cache}
    resolved = recipe(make_recipe, 1, options, compute=compute, model=SMALL)
    compiled = run(resolved, 1, {"seen": Seen(tmp_path / "seen")}, timeout_s=250)
    worst = compare(compiled, plain)
    assert_within(worst, bounds)
    assert worst["gradients"][0] > 0, "nothing was compiled"
    assert all(record["plugin/compile/recompiles"] == 0 for record in records_of(tmp_path / "seen"))
    assert any(Path(cache).rglob("*.so")), "the recipe's cache folder was not used"
