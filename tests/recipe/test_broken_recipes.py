"""Each broken recipe of the table ends with status 2 and a message that names file, line, key and fix."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import broken_names
import broken_numbers
import broken_texts
import broken_values
import pytest
import recipe_plugins
from recipe_cases import HIDDEN, Case, recipe

from camshaft.cli import run

CASES = [*broken_values.CASES, *broken_texts.CASES, *broken_names.CASES, *broken_numbers.CASES]
ONE_LINE = re.compile(r"error: .+")


def lines_marked(text: str | bytes) -> list[int]:
    """Line numbers of the marks, as often as a line has them."""
    data = text if isinstance(text, bytes) else text.encode()
    return [number for number, line in enumerate(data.split(b"\n"), 1) for _ in range(line.count(b"#!"))]


def write(case: Case, folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_bytes(case.text if isinstance(case.text, bytes) else case.text.encode())
    return path


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_broken(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe_plugins.install(monkeypatch)
    monkeypatch.chdir(tmp_path)
    for name, value in case.environ.items():
        monkeypatch.setenv(name, value)
    path = write(case, tmp_path)
    status = run(["validate", path.name, *case.options, *case.overrides])
    out, err = capsys.readouterr()
    problems = err.splitlines()
    assert (status, out) == (2, "")
    assert all(ONE_LINE.fullmatch(line) for line in problems)
    assert len(problems) == len(case.expect), err
    marks = lines_marked(case.text)
    for number, (key, message, fix) in enumerate(case.expect):
        place = "error: override 1" if case.overrides else f"error: recipe.yaml:{marks[number]}: "
        found = [line for line in problems if line.startswith(place) and (not key or f": {key}: " in line)]
        assert any(message in line and fix in line.partition(" Fix: ")[2] for line in found), (place, key, err)
    assert HIDDEN not in err


def test_table_is_large_and_names_are_unique() -> None:
    assert len(CASES) >= 60
    assert len({case.name for case in CASES}) == len(CASES)


def test_good_recipe_is_valid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe())
    assert run(["validate", str(path)]) == 0
    assert capsys.readouterr() == (f"{path}: valid\n", "")


TEN = """\
schema_version: 1
name: ../up                                     # 2 name
seed: 1e3                                       # 3 type
model: {preset: llama-tiney}                    # 4 preset
tokenizer: {type: byte, vocab: 3}               # 5 unknown key
data: {train: python-docs, pack: no}            # 6 no
batch: {micro_batch_size: 2, global_batch_size: 9}  # 7 algebra
training: {max_steps: 5, max_tokens: 100}       # 8 two ends
training: {}                                    # 9 duplicate
plugins:
  adamw: {lr: '1e-4'}                           # 11 quoted
  nope_nope: {}                                 # 12 unknown plugin
  wandb: {api_key: abc}                         # 13 secret
run: {root: "${env:CAMSHAFT_TEST_UNSET}"}       # 14 environment
"""


def test_all_faults_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ten.yaml"
    path.write_text(TEN)
    assert run(["validate", str(path), "launch.procesess=2"]) == 2
    err = capsys.readouterr().err
    lines = {int(found) for found in re.findall(r"ten\.yaml:(\d+): ", err)}
    assert lines == {2, 3, 4, 5, 6, 7, 9, 11, 12, 13, 14}
    assert "override 1 (launch.procesess): launch.procesess: unknown key 'procesess'. Did you mean 'processes'?" in err


def test_faults_are_found_without_torch(tmp_path: Path) -> None:
    path = tmp_path / "ten.yaml"
    path.write_text(TEN)
    code = (
        "import sys\nfrom camshaft.cli import run\n"
        f"status = run(['validate', {str(path)!r}])\n"
        "heavy = sorted({'torch', 'deepspeed', 'wandb', 'rich', 'tokenizers'} & set(sys.modules))\n"
        "print(status, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "2 []\n", done.stderr
