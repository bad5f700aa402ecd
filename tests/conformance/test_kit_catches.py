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
    "plans_by_last_rank": "test_plan_is_pure_and_needs_no_torch",
    "plans_by_turn": "test_plan_is_pure_and_needs_no_torch",
    "plans_with_torch": "test_plan_is_pure_and_needs_no_torch",
    "misspelt": "test_hooks_match_their_specs",
    "mislabelled": "test_hooks_match_their_specs",
    "scales": "test_equals_the_reference",
    "clips_alone": "test_equals_the_reference_beside_others[zero]",
    "touches": "test_writes_only_what_it_claims",
    "writes": "test_writes_only_what_it_claims",
    "forgets": "test_goes_on_after_a_checkpoint",
    "unsaved": "test_goes_on_after_a_checkpoint",
    "saves_alone": "test_goes_on_after_a_checkpoint",
    "one_rank_forgets": "test_goes_on_after_a_checkpoint",
    "saving_writes": "test_goes_on_after_a_checkpoint",
    "hooks_everything": "test_leaves_nothing_behind",
    "changes_classes": "test_leaves_nothing_behind",
    "leaves_hooks": "test_leaves_nothing_behind",
    "leaves_threads": "test_leaves_nothing_behind",
    "calls_pluggy": "test_makes_no_pluggy_call_in_a_step",
    "calls_extra": "test_makes_no_pluggy_call_in_a_step",
    "one_rank": "test_frozen_and_unused_parameters",
    "kernels_wrong": "test_kernels_match_fp64",
    "kernels_of_sums": "test_kernels_match_fp64",
    "kernels_of_steps": "test_kernels_match_fp64",
    "kernels_of_ones_own": "test_kernels_match_fp64",
}
SAYS = {
    "plans_by_rank": "ranks plan differently",
    "plans_by_last_rank": "ranks plan differently",
    "plans_by_turn": "asked twice, two answers",
    "plans_with_torch": "neither torch nor what needs it",
    "misspelt": "did you mean 'post_step'",
    "mislabelled": "it claims gradient.layout, as 'reducer' or 'sharder' does",
    "clips_alone": "beside 'zero' on 2 ranks",
    "touches": "wrote the gradient of",
    "writes": "changed weights 'model.norm.weight'",
    "forgets": "differs from that of an undisturbed run",
    "unsaved": "step 3",
    "saves_alone": "saves state, but has no load_state_dict",
    "one_rank_forgets": "'one_rank_forgets' is not the same on ranks 0 and 1",
    "saving_writes": "over the bound",
    "hooks_everything": "global_forward_hooks on every module",
    "changes_classes": "module 'model.norm' is a Mine, and was a RMSNorm",
    "leaves_hooks": "forward_hooks on module 'model.norm'",
    "leaves_threads": "thread 'stays'",
    "one_rank": "a gradient on one side only",
    "calls_extra": "post_step",
    "kernels_wrong": "swiglu by wrong",
    "kernels_of_sums": "add_rms_norm by off",
    "kernels_of_steps": "adamw by off, weight_decay 0.2",
    "kernels_of_ones_own": "nothing to compare 'others.twice' with; say what in reference_kernels",
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """Test to (outcome, what was said) of the good plugin's every test and each broken one's own."""
    site = tmp_path_factory.mktemp("site")
    install(site)
    (site / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    cases = site / "test_broken.py"
    cases.symlink_to(BROKEN / "cases_of_broken.py")
    (site / "forked.py").symlink_to(BROKEN.parents[1] / "forked.py")
    chosen = [f"{cases}::Test_{plugin}::{test}" for plugin, test in CAUGHT.items()]
    rules = ["-v", "--tb=short", "-p", "forked", "-p", "no:cacheprovider", f"--rootdir={site}"]
    command = [sys.executable, "-m", "pytest", *rules]
    environment = {
        **os.environ,
        "PYTHONPATH": str(site),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "400",
        "PYTEST_ADDOPTS": "",
    }
    done = subprocess.run(
        [*command, f"{cases}::Test_good", *chosen],
        cwd=site, env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    name = r"(Test_\w+{0}test_\w+(?:\[[a-z_]+\])?)(?:\[[\d-]+\])?"
    results = re.findall(rf"::{name.format('::')} (PASSED|FAILED|ERROR|SKIPPED)", done.stdout)
    sections = re.split(rf"^_{{3,}} {name.format('[.]')} _{{3,}}$", done.stdout, flags=re.MULTILINE)
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
    assert len(good) == 11 and set(good.values()) == {"PASSED"}, (good, outcomes)


@pytest.mark.parametrize("plugin", CAUGHT)
def test_a_broken_promise_is_caught(outcomes: dict[str, tuple[str, str]], plugin: str) -> None:
    outcome, said = outcomes[f"Test_{plugin}::{CAUGHT[plugin]}"]
    assert outcome == "FAILED" and SAYS.get(plugin, "") in said, said
