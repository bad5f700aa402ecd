"""What a recipe names and nothing has is told in less than a second, by a process that has not imported torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import broken_names
import broken_numbers
import pytest
from recipe_cases import recipe

from camshaft.cli import run
from camshaft.models.config import ModelConfig
from camshaft.models.names import module_names, parameter_names

CASES = [*broken_names.CASES, *broken_numbers.NUMBERS]
LARGE = recipe(
    model="model: {preset: llama-3.1-405b}",
    data="data: {sequence_length: 64}",
    plugins="plugins:\n  zero: {stage: 3, units: [model.layers.*, layers.*]}\n  adamw: {lr: 1e-3}\n"
    "  recompute: {layers: [125, 126]}\n  compile: {backend: eager, modules: [model.layers.*, 'model.layers.*.m']}",
)
SCRIPT = """
import json, sys, time
from camshaft.cli import run
found = []
for arguments in json.load(open(sys.argv[1])):
    began = time.perf_counter()
    status = run(["validate", *arguments])
    found.append((status, time.perf_counter() - began))
heavy = sorted({"torch", "deepspeed", "wandb", "numpy"} & set(sys.modules))
print(json.dumps([found, heavy]))
"""


def test_in_a_second_and_without_torch(tmp_path: Path) -> None:
    lines = []
    texts = {case.name: (case.text, (*case.options, *case.overrides)) for case in CASES} | {"large": (LARGE, ())}
    for number, (text, options) in enumerate(texts.values()):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text if isinstance(text, str) else text.decode())
        lines.append([str(path), *options])
    (tmp_path / "lines.json").write_text(json.dumps(lines))
    line = [sys.executable, "-c", SCRIPT, str(tmp_path / "lines.json")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    found, heavy = json.loads(done.stdout)
    assert {status for status, _ in found} == {2}, done.stderr
    assert "torch" not in heavy
    slow = [name for name, (_, seconds) in zip(texts, found, strict=True) if seconds > 1]
    assert slow == []
    told = done.stderr.splitlines()[-3:]
    assert [line.partition(": plugins.")[2].partition(":")[0] for line in told] == [
        "zero.units.1",
        "recompute.layers.1",
        "compile.modules.1",
    ]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("more", [True, False])
def test_names_are_those_of_the_decoder(tied: bool, more: bool) -> None:
    import torch

    from camshaft.models.llama import Llama

    config = ModelConfig(20, 8, 12, 3, 2, 1, 4, 32, tie_word_embeddings=tied, attention_bias=more, qk_norm=more)
    with torch.device("meta"):
        model = Llama(config)
    assert module_names(config) == tuple(name for name, _ in model.named_modules() if name)
    every = tuple(name for name, _ in model.named_parameters(remove_duplicate=False))
    assert parameter_names(config) == every


UNREADABLE = {
    ".": ("error: .: cannot be read: Is a directory. Fix: name a file in it", None),
    "nothing.yaml": ("error: nothing.yaml: cannot be read: No such file or directory. Fix: check the path", None),
    "a\0b": ("error: a\\x00b: cannot be read: a path with a control character. Fix: check the path", None),
    "wide.yaml": ("error: wide.yaml:1: not UTF-8 text. Fix: save the file as UTF-8", recipe().encode("utf-16")),
    "empty.yaml": ("error: empty.yaml:1: the recipe is empty. Fix: start it with 'schema_version: 1'", b""),
    "loop.yaml/x": ("error: loop.yaml/x: cannot be read: Not a directory. Fix: check the path", None),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_no_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop.yaml").write_text("")
    told, content = UNREADABLE[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert run(["validate", name]) == 2
    assert capsys.readouterr().err == f"{told}\n"


def test_a_model_of_another_package_is_not_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from camshaft_adamw import Plugin

    path = tmp_path / "recipe.yaml"
    path.write_text(recipe(plugins="plugins:\n  ddp: {}\n  adamw: {lr: 1e-3}\n  recompute: {layers: [77]}"))
    assert run(["validate", str(path)]) == 2
    for hook, status in (("rewrite", 0), ("build_model", 0)):
        with monkeypatch.context() as changed:
            changed.setattr(Plugin, hook, lambda self, world, config: None, raising=False)
            getattr(Plugin, hook).camshaft_impl = {}
            assert run(["validate", str(path)]) == status
