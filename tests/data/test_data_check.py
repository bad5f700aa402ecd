"""What a recipe's data can get wrong, found before anything is built."""

from __future__ import annotations

import json
import os
import struct

import pytest
from data_files import indexed, keys, sentence

from camshaft import data
from camshaft.data.tokenizer import train_bpe
from camshaft.errors import RecipeError
from camshaft.recipe import check


def damaged(folder, name, *, size=None, header=None):
    part = indexed(folder, name, [[1, 2, 3] * 30, [4] * 10])
    if size is not None:
        os.truncate(folder / f"{name}.bin", size)
    if header is not None:
        offset, value = header
        content = bytearray((folder / f"{name}.idx").read_bytes())
        content[offset : offset + len(value)] = value
        (folder / f"{name}.idx").write_bytes(content)
    return part


def test_every_fault_of_a_blend_is_found_at_once_with_its_key_and_line(write, tmp_path):
    good = indexed(tmp_path, "good", [[1, 2, 3] * 30 for _ in range(4)])
    blend = [
        good,
        {"prefix": "missing"},
        damaged(tmp_path, "truncated", size=100),
        damaged(tmp_path, "magic", header=(0, b"X")),
        damaged(tmp_path, "float", header=(17, b"\x06")),
        damaged(tmp_path, "version", header=(9, struct.pack("<Q", 3))),
        indexed(tmp_path, "above", [[1] * 60, [2, 50, 3] * 20]),
        indexed(tmp_path, "short", [[1, 2]]),
        {**good, "weight": 1e-9},
    ]
    resolved = write({"blend": blend}, model={"vocab_size": 50})
    problems = data.check(resolved)
    assert sorted(keys(problems)) == sorted(
        ["data.train.blend.8.weight", *(f"data.train.blend.{number}.prefix" for number in range(1, 8))]
    )
    told = {problem.key.split(".")[3]: problem for problem in problems}
    assert "missing.idx: there is no such file" in told["1"].message
    assert "truncated.bin: is truncated: the index expects 200 bytes" in told["2"].message
    assert "found 100" in told["2"].message
    assert "above.bin: token 61 (byte 122) has id 50, and the vocabulary has ids 0 to 49" in told["6"].message
    assert "at most 3 tokens, and one sample takes 32" in told["7"].message
    lines = (tmp_path / "recipe.yaml").read_text().splitlines()
    for problem in problems:
        assert problem.file.endswith("recipe.yaml")
        assert problem.fix
        key, index = problem.key.split(".")[-1], int(problem.key.split(".")[3])
        shown = blend[index][key]
        assert json.dumps(shown) in lines[problem.line - 1]
    with pytest.raises(RecipeError) as caught:
        data.prepare(resolved)
    assert keys(caught.value.problems) == ["data.train.blend.1.prefix"]


def test_faults_of_text_are_found_before_it_is_tokenised(write, text, tmp_path):
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"\xe4rger")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "tiny.txt").write_text("tiny")
    cases = {
        ("missing.txt",): ("data.train.files.0", "missing.txt: there is no such file"),
        (".",): ("data.train.files.0", ": is a folder"),
        ("*.txt",): ("data.train.files.0", "*.txt: there is no such file"),
        ("blank.txt",): ("data.train.files", "corpus is empty"),
        ("text.jsonl", "latin.txt"): ("data.train.files.1", "latin.txt: is not UTF-8"),
        ("bad.jsonl",): ("data.train.files.0", "bad.jsonl:2: is not JSON"),
        ("tiny.txt",): ("data.train.files", "at most 8 tokens"),
    }
    for files, (key, message) in cases.items():
        (problem,) = data.check(write({"files": list(files)}))
        assert problem.key == key
        assert message in problem.message
    assert data.check(write({"files": ["text.jsonl", "blank.txt", "tiny.txt"]})) == []
    assert not (tmp_path / "cache").exists()


def test_faults_of_the_tokenizer(write, text, tmp_path):
    part = indexed(tmp_path, "a", [[1, 2, 3] * 30 for _ in range(4)])
    (tmp_path / "t.json").write_text(train_bpe([sentence(n) for n in range(9)], 300))
    (tmp_path / "bad.json").write_text("{")
    fixed = {"vocab_size": 50}
    cases = [
        (text, {"type": "file"}, {}, ["tokenizer"]),
        (text, {"type": "file", "path": "no.json"}, {}, ["tokenizer.path"]),
        (text, {"type": "file", "path": "bad.json"}, {}, ["tokenizer.path"]),
        (text, {"type": "file", "path": "t.json", "vocab_size": 300}, {}, ["tokenizer.vocab_size"]),
        (text, {"type": "byte", "path": "t.json"}, {}, ["tokenizer.path"]),
        (text, {"type": "file", "path": "t.json"}, {"vocab_size": 256}, ["model.vocab_size"]),
        (text, {"type": "byte"}, {"vocab_size": 256}, ["model.vocab_size"]),
        (text, {"type": "byte"}, {"vocab_size": 257}, []),
        (text, {"type": "file", "path": "t.json"}, {}, []),
        ({"blend": [part]}, {"type": "bpe"}, {"vocab_size": 5000}, ["tokenizer"]),
        ({"blend": [part]}, {"type": "byte"}, {}, []),
        ({"blend": [part]}, None, fixed, []),
    ]
    for source, tokenizer, model, expected in cases:
        resolved = write(source, tokenizer=tokenizer, model=model)
        found = check(resolved).problems  # with the model's checks, which say each thing once
        assert keys(found) == expected, (tokenizer, model)
        assert set(data.check(resolved)) <= set(found)
    mixed = write({"blend": [part]}, model=fixed, data={"validation": text})
    assert keys(data.check(mixed)) == ["data.validation"]
    with pytest.raises(RecipeError, match=r"no\.json: cannot be read"):
        data.vocab_size(write(text, tokenizer={"type": "file", "path": "no.json"}))


def test_both_kinds_of_validation_set_are_one_too_many(write, text, tmp_path):
    (tmp_path / "held.txt").write_text(sentence(999))
    resolved = write(text, data={"validation": {"files": ["held.txt"]}, "validation_fraction": 0.1})
    assert keys(data.check(resolved)) == ["data.validation_fraction"]
