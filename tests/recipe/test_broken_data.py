"""Recipes whose data is broken: the message names the recipe's line, the file and what to do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from recipe_cases import recipe

from camshaft.cli import run
from camshaft.data.writer import IndexedWriter

BLEND = "data:\n  sequence_length: 16\n  train:\n    blend:\n      - prefix: corpus/good\n      - prefix: corpus/{}\n"
INDEXED = {"model": "model: {preset: llama-tiny, vocab_size: 300}", "tokenizer": ""}


def indexed(folder: Path, name: str, ids: list[int], documents: int = 8) -> Path:
    """Write an indexed dataset of equal documents and return its prefix."""
    prefix = folder / "corpus" / name
    prefix.parent.mkdir(exist_ok=True)
    with IndexedWriter(prefix, np.dtype("uint16")) as writer:
        for _ in range(documents):
            writer.add(ids)
    return prefix


def problems(folder: Path, capsys: pytest.CaptureFixture[str], **sections: str) -> list[str]:
    """Lines that ``validate`` writes for the recipe; it must end with status 2."""
    path = folder / "recipe.yaml"
    path.write_text(recipe(**sections))
    assert run(["validate", str(path)]) == 2
    return [line.replace(f"{folder}/", "") for line in capsys.readouterr().err.splitlines()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    indexed(tmp_path, "good", list(range(100)))
    return tmp_path


def test_good_data_is_valid(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "recipe.yaml").write_text(recipe(**INDEXED, data=BLEND.format("good").rstrip()))
    status = run(["validate", str(folder / "recipe.yaml")])
    assert (status, capsys.readouterr().err) == (0, "")


def test_token_id_above_the_vocabulary(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    indexed(folder, "high", [*range(50), 300])
    (line,) = problems(folder, capsys, **INDEXED, data=BLEND.format("high").rstrip())
    assert line.startswith("error: recipe.yaml:9: data.train.blend.1.prefix: ")
    assert "300" in line
    assert "Fix: " in line


def test_truncated_bin(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = indexed(folder, "short", list(range(100))).with_suffix(".bin")
    path.write_bytes(path.read_bytes()[:-1])
    (line,) = problems(folder, capsys, **INDEXED, data=BLEND.format("short").rstrip())
    assert line.startswith("error: recipe.yaml:9: data.train.blend.1.prefix: ")
    assert "corpus/short.bin" in line
    assert "1599" in line, "says how long it is"
    assert "Fix: " in line


def test_damaged_index(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = indexed(folder, "torn", list(range(100))).with_suffix(".idx")
    path.write_bytes(b"NOTANIDX" + path.read_bytes()[8:])
    (line,) = problems(folder, capsys, **INDEXED, data=BLEND.format("torn").rstrip())
    assert line.startswith("error: recipe.yaml:9: data.train.blend.1.prefix: ")
    assert "corpus/torn.idx" in line


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_half_of_a_dataset(folder: Path, capsys: pytest.CaptureFixture[str], suffix: str) -> None:
    indexed(folder, "half", list(range(100))).with_suffix(suffix).unlink()
    (line,) = problems(folder, capsys, **INDEXED, data=BLEND.format("half").rstrip())
    assert line.startswith("error: recipe.yaml:9: data.train.blend.1.prefix: ")
    assert f"corpus/half{suffix}" in line


def test_every_faulty_part_of_a_blend_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "corpus" / "good.bin").unlink()
    lines = problems(folder, capsys, **INDEXED, data=BLEND.format("nowhere").rstrip())
    assert [line.split(": ")[1:3] for line in lines] == [
        ["recipe.yaml:8", "data.train.blend.0.prefix"],
        ["recipe.yaml:9", "data.train.blend.1.prefix"],
    ]


@pytest.mark.parametrize(
    ("name", "content", "key", "message"),
    [
        ("empty.txt", b"", "data.train.files", "empty"),
        ("empty.jsonl", b"\n\n", "data.train.files", "empty"),
        ("latin.txt", b"caf\xe9 " * 100, "data.train.files.0", "UTF-8"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "data.train.files.0", "2"),
        ("other.jsonl", b'{"body": "a"}\n', "data.train.files.0", "text"),
        ("tiny.txt", b"ab", "data.train.files", "one sample takes 64"),
    ],
)
def test_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, key: str, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    data = f"data:\n  sequence_length: 64\n  train:\n    files: [{name}]"
    (line,) = problems(tmp_path, capsys, data=data)
    assert line.startswith(f"error: recipe.yaml:8: {key}: ")
    assert message in line
    assert "Fix: " in line


def test_missing_files_are_all_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = "data:\n  sequence_length: 64\n  train: {files: [a.txt,\n    b.txt]}"
    lines = problems(tmp_path, capsys, data=data)
    assert [line.split(": ")[1:4] for line in lines] == [
        ["recipe.yaml:7", "data.train.files.0", "a.txt"],
        ["recipe.yaml:8", "data.train.files.1", "b.txt"],
    ]


def test_missing_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = problems(tmp_path, capsys, tokenizer="tokenizer:\n  type: file\n  path: nowhere.json")
    assert line.startswith("error: recipe.yaml:6: tokenizer.path: ")
    assert "nowhere.json" in line


def test_tokenizer_larger_than_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = problems(
        tmp_path, capsys, model="model: {preset: llama-tiny, vocab_size: 300}", tokenizer="tokenizer: {vocab_size: 512}"
    )
    assert line.startswith("error: recipe.yaml:3: model.vocab_size: 300 rows are too few for the tokenizer's 512")
