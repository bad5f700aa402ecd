"""``camshaft validate`` with and without a GPU: what ``train`` would refuse here, and nothing of elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from camshaft.cli import inventory, run

RECIPE = """\
schema_version: 1
name: small
model: {preset: llama-tiny}
tokenizer: {type: byte}
data: {sequence_length: 64}
batch: {micro_batch_size: 8, global_batch_size: 8}
training: {max_steps: 5}
launch: {processes: 1}
plugins: {adamw: {lr: 1e-3}}
"""
FP8, GRAPHS, TRITON = "precision.compute=fp8", "compile.cuda_graphs=true", "kernels.rms_norm=triton"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(inventory, "has_gpu_driver", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    (tmp_path / "small.yaml").write_text(RECIPE)
    return str(tmp_path / "small.yaml")


@pytest.mark.parametrize("part", [FP8, GRAPHS, TRITON])
@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_what_needs_a_gpu_is_refused_without_one(
    recipe: str, part: str, device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["validate", recipe, f"launch.device={device}", f"plugins.{part}"]) == 2
    told = capsys.readouterr().err
    key = part.partition("=")[0]
    assert told.startswith(f"error: override 2 (plugins.{key}): plugins.{key}: ") and told.count("\n") == 1
    assert "this run is on a CPU" in told and "Fix: " in told


@pytest.mark.parametrize("part", [FP8, GRAPHS])
@pytest.mark.parametrize("elsewhere", [["launch.device=cuda"], ["--world-size", "1"]], ids=" ".join)
def test_a_recipe_for_another_machine_is_legal(recipe: str, part: str, elsewhere: list[str]) -> None:
    assert run(["validate", recipe, f"plugins.{part}", *elsewhere]) == 0


def test_with_a_gpu_the_same_recipe_is_for_it(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "has_gpu_driver", lambda: True)
    monkeypatch.setattr("camshaft_precision.rules.gpus", lambda: (("Old", (8, 0)),))
    assert run(["validate", recipe, f"plugins.{FP8}"]) == 2
    monkeypatch.setattr("camshaft_precision.rules.gpus", lambda: (("New", (9, 0)),))
    assert run(["validate", recipe, f"plugins.{FP8}"]) == 0
    assert run(["validate", recipe, f"plugins.{FP8}", "launch.device=cpu"]) == 2
