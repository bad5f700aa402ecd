"""The documented order of hooks against the calls of a real run that continues an earlier one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest

from tools.docs.order import PLAN_ONLY, RUN_ORDER, STEP

HERE = Path(__file__).resolve().parent
RECIPE = """
schema_version: 1
name: order
model: {preset: llama-nano}
tokenizer: {type: byte}
data: {sequence_length: 32}
batch: {micro_batch_size: 2, global_batch_size: 4}
training: {max_steps: 2, log_every: 1}
launch: {processes: 1, device: cpu}
plugins:
  every_hook: {}
  adamw: {lr: 1e-3}
  lr_schedule: {type: cosine}
  clip: {}
  precision: {compute: fp32}
  checkpoint: {every_steps: 100}
"""


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("order")
    installed = folder / "every_hook-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: every-hook\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[camshaft.plugins]\nevery_hook = every_hook:Plugin\n")
    (folder / "order.yaml").write_text(RECIPE)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(HERE)])}
    for steps in (2, 4):
        command = [
            sys.executable, "-c", "import every_hook; every_hook.main()", str(folder / "calls.json"), "train",
            "order.yaml", f"run.dir={folder / 'run'}", f"data.cache_dir={folder / 'cache'}",
            f"training.max_steps={steps}",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stdout + done.stderr
    found: list[str] = json.loads((folder / "calls.json").read_text())
    return found


def test_a_run_calls_every_hook_in_the_documented_order(calls: list[str]) -> None:
    assert tuple(dict.fromkeys(calls)) == tuple(name for name in RUN_ORDER if name not in PLAN_ONLY)


def test_a_step_with_two_microbatches_calls_its_hooks_in_the_documented_order(calls: list[str]) -> None:
    forward, backward, *rest = (stage.hooks for stage in STEP)
    window = [*forward, *backward, *forward, *backward, *(name for hooks in rest for name in hooks)]
    merged = [name for name, _ in groupby(calls)]  # two plugins in one hook count once
    last = len(merged) - merged[::-1].index("post_step")
    assert merged[last - len(window) : last] == window
    assert merged.count("post_step") == 2  # steps 3 and 4; the first two belong to the earlier run
