"""What ``train`` proposes at its end can be typed as it stands."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from camshaft.cli import closing, run
from camshaft.recipe import load
from camshaft.rundir import RunDirectory

RECIPE = """
schema_version: 1
name: closing
model: {preset: llama-nano}
tokenizer: {type: byte}
data: {train: {files: [text.txt]}, sequence_length: 32, validation_fraction: 0}
batch: {micro_batch_size: 2, global_batch_size: 4}
training: {max_steps: 6}
launch: {processes: 2}
plugins: {ddp: {}, adamw: {lr: 1.0e-3}, clip: {}}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("some words " * 500)
    (tmp_path / "my recipe.yaml").write_text(RECIPE)
    return "my recipe.yaml"


def proposed(recipe: str, overrides: list[str], world_size: int) -> list[list[str]]:
    """Words after the program's name of every line."""
    loaded = load(recipe, overrides).recipe
    world = SimpleNamespace(recipe=loaded, batch=loaded.batch, world_size=world_size)
    state: Any = SimpleNamespace(world=world)
    lines = [shlex.split(line) for line, _ in closing.next_steps(state, recipe, overrides)]
    program = closing.program()
    assert all(words[: len(program)] == program for words in lines)
    return [words[len(program) :] for words in lines]


@pytest.mark.parametrize(
    ("overrides", "world_size", "lines"),
    [
        (["plugins.adamw.lr=2e-3", "run.dir=here"], 2, 3),
        (["training.max_steps=8", "launch.launcher=torchrun", "plugins.clip={max_norm: 2}"], 2, 3),
        (["plugins.ddp=null", "launch.processes=1"], 1, 1),
    ],
)
def test_every_line_is_right_and_keeps_what_was_overridden(
    recipe: str, overrides: list[str], world_size: int, lines: int
) -> None:
    found = proposed(recipe, overrides, world_size)
    assert len(found) == lines
    for words in found:
        assert run(["validate" if words[0] == "train" else "plan", *words[1:]]) == 0
        others = [text for text in overrides if not text.startswith(("run.", "training.", "launch.launcher"))]
        assert set(others) <= set(words)
        assert not any(word.startswith("run.dir=") for word in words)
    twice = f"training.max_steps={12 if 'training.max_steps=8' not in overrides else 16}"
    assert any(words[0] == "train" and words[-1] == twice for words in found)


@pytest.mark.parametrize("written", [True, False])
def test_only_files_that_are_there_are_named(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], written: bool
) -> None:
    directory = RunDirectory(tmp_path / "run").create()
    if written:
        directory.metrics.touch()
        (directory.checkpoints / "step_00000006").mkdir(parents=True)
    loaded = load(recipe).recipe
    world = SimpleNamespace(recipe=loaded, batch=loaded.batch, world_size=2, run=directory)
    state: Any = SimpleNamespace(world=world, model=None)
    data: Any = SimpleNamespace(tokenizer=None)
    closing.show(state, data, recipe)
    named = [line.split()[0] for line in capsys.readouterr().out.splitlines() if str(tmp_path) in line]
    assert named == ["run", *["metrics", "checkpoint"] * written]


def test_the_program_is_named_as_the_shell_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "venv" / "bin"
    folder.mkdir(parents=True)
    (folder / "camshaft").write_text("#!/bin/sh\n")
    (folder / "camshaft").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert closing.program() == [os.path.join("venv", "bin", "camshaft")]
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin")
    assert closing.program() == ["camshaft"]
    (folder / "camshaft").unlink()
    assert closing.program() == [str(folder / "python"), "-m", "camshaft"]


@pytest.mark.parametrize(
    ("readable", "degrees", "what"),
    [
        (False, {}, "parameters"),
        (True, {"tp": 2}, "parameters"),
        (True, {"pp": 2}, "layers"),
        (False, {"pp": 2}, "layers"),
    ],
)
def test_a_divided_model_is_not_run(
    monkeypatch: pytest.MonkeyPatch, readable: bool, degrees: dict[str, int], what: str
) -> None:
    def refuse(*arguments: Any) -> str:
        raise AssertionError("the model was run")

    world = SimpleNamespace(readable=readable, mesh=SimpleNamespace(degree=lambda axis: degrees.get(axis, 1)))
    state: Any = SimpleNamespace(world=world, step=7)
    data: Any = SimpleNamespace(tokenizer=object())
    monkeypatch.setattr(closing, "text_sample", refuse)
    assert closing.sample(state, data) == f"no sample of the model: its {what} are divided over ranks"
    world.readable = True
    degrees.clear()
    monkeypatch.setattr(closing, "text_sample", lambda *arguments: "some words")
    assert closing.sample(state, data) == "sample of the model after step 7:\n  some words"


def test_a_sample_needs_a_tokenizer_and_our_model() -> None:
    import torch

    from camshaft.models.config import resolve
    from camshaft.models.llama import Llama
    from camshaft.recipe.schema import Model

    with torch.device("meta"):
        model = Llama(resolve(Model(preset="llama-nano"), 300))

    def speaks(tokenizer: object = "some", trained: object = model) -> bool:
        state: Any = SimpleNamespace(model=trained)
        data: Any = SimpleNamespace(tokenizer=tokenizer)
        return closing.speaks(state, data)

    assert speaks()
    assert not speaks(tokenizer=None) and not speaks(trained=torch.nn.Linear(1, 1))
