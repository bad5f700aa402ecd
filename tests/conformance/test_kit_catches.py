"""The kit catches each broken promise, by the test that is named after it, and lets a good plugin pass."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BROKEN = Path(__file__).parent / "broken"
CAUGHT = {
    "open_options": "test_options_refuse_unknown_keys",
    "plans_by_rank": "test_plan_is_pure_and_needs_no_torch",
    "plans_by_turn": "test_plan_is_pure_and_needs_no_torch",
    "plans_with_torch": "test_plan_is_pure_and_needs_no_torch",
    "misspelt": "test_hooks_match_their_specs",
    "scales": "test_equals_the_reference",
    "writes": "test_writes_only_what_it_claims",
    "forgets": "test_goes_on_after_a_checkpoint",
    "leaves_hooks": "test_leaves_nothing_behind",
    "leaves_threads": "test_leaves_nothing_behind",
    "calls_pluggy": "test_makes_no_pluggy_call_in_a_step",
    "one_rank": "test_frozen_and_unused_parameters",
    "kernels_wrong": "test_kernels_match_fp64",
}
SAYS = {
    "plans_by_rank": "ranks plan differently",
    "plans_by_turn": "asked twice, two answers",
    "plans_with_torch": "neither torch nor what needs it",
    "misspelt": "did you mean 'post_step'",
    "writes": "changed weights 'model.norm.weight'",
    "forgets": "differs from that of an undisturbed run",
    "leaves_hooks": "forward_hooks on module 'model.norm'",
    "leaves_threads": "thread 'stays'",
    "one_rank": "a gradient on one side only",
    "kernels_wrong": "swiglu by wrong",
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """Test to (outcome, what was said) of the good plugin's every test and each broken one's own."""
    site = tmp_path_factory.mktemp("site")
    install(site)
    (site / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    cases = site / "test_broken.py"
    cases.symlink_to(BROKEN / "cases_of_broken.py")
    chosen = [f"{cases}::Test_{plugin}::{test}" for plugin, test in CAUGHT.items()]
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", f"--rootdir={site}"]
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "COLUMNS": "400"}
    done = subprocess.run(
        [*command, f"{cases}::Test_good", *chosen],
        cwd=site, env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    results = re.findall(r"::(Test_\w+::test_\w+)(?:\[[\d-]+\])? (PASSED|FAILED|ERROR|SKIPPED)", done.stdout)
    sections = re.split(r"^_{3,} (Test_\w+\.test_\w+)(?:\[[\d-]+\])? _{3,}$", done.stdout, flags=re.MULTILINE)
    said = dict(zip(sections[1::2], sections[2::2], strict=True))
    return {name: (outcome, said.get(name.replace("::", "."), "")) for name, outcome in results}


def install(site: Path) -> None:
    """Make the plugins visible as an installed distribution is."""
    (site / "camshaft_broken.py").symlink_to(BROKEN / "camshaft_broken.py")
    info = site / "camshaft_broken-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: camshaft-broken\nVersion: 0.1\n")
    names = {plugin: "".join(word.title() for word in plugin.split("_")) for plugin in ("good", *CAUGHT)}
    names["kernels_wrong"] = "Kernels"
    lines = [f"{plugin} = camshaft_broken:{name}" for plugin, name in names.items()]
    (info / "entry_points.txt").write_text("\n".join(["[camshaft.plugins]", *lines, ""]))


def test_a_good_plugin_passes_everything(outcomes: dict[str, tuple[str, str]]) -> None:
    good = {name: outcome for name, (outcome, _) in outcomes.items() if name.startswith("Test_good::")}
    assert len(good) == 9 and set(good.values()) == {"PASSED"}, (good, outcomes)


@pytest.mark.parametrize("plugin", CAUGHT)
def test_a_broken_promise_is_caught(outcomes: dict[str, tuple[str, str]], plugin: str) -> None:
    outcome, said = outcomes[f"Test_{plugin}::{CAUGHT[plugin]}"]
    assert outcome == "FAILED" and SAYS.get(plugin, "") in said, said
