"""``camshaft data``: what it writes, what it says, and with which status it refuses."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys

import pytest

from camshaft.cli import run
from camshaft.data.indexed import IndexedDataset
from camshaft.data.tokenizer import FileTokenizer

TEXTS = ["first document", "", "zweites Dokument: ü", "third " * 50]


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    (tmp_path / "b.txt").write_text("a whole file")
    return tmp_path


def documents(prefix, decode):
    found = IndexedDataset(prefix)
    spans = [(found.start(number), found.start(number + 1)) for number in range(found.documents)]
    return [decode(found.read(start, end).tolist()) for start, end in spans]


WRITTEN = ["first document", "zweites Dokument: ü", "third " * 50, "a whole file"]


def test_build_with_bytes_and_inspect(files, capsys):
    assert run(["data", "build", "--output", "out/x", "--byte", "--json-key", "body", "a.jsonl", "b.txt"]) == 0
    told = capsys.readouterr().out
    size = sum(len(text.encode()) for text in WRITTEN)
    assert f"4 documents, {size + 4:,} tokens, {size:,} bytes of text in" in told
    assert f"prefix: {files}/out/x" in told
    assert "tokenizer: {type: byte}" in told
    assert documents(files / "out/x", lambda ids: bytes(ids[:-1]).decode()) == WRITTEN
    assert sorted(path.name for path in (files / "out").iterdir()) == ["x.bin", "x.idx"]
    assert run(["data", "inspect", "out/x"]) == 0
    shown = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert shown["documents"].strip() == "4"
    assert shown["tokens"].strip() == str(size + 4)
    assert "to 256, stored as uint16" in shown["ids"]
    assert shown["first tokens"].split() == [str(value) for value in b"first document"] + ["256"]


def test_build_trains_a_bpe_that_the_recipe_line_names(files, capsys):
    command = ["data", "build", "--output", "x", "--train-bpe", "270", "--json-key", "body", "--shuffle"]
    assert run([*command, "a.jsonl", "b.txt"]) == 0
    tokenizer = FileTokenizer(files / "x.tokenizer.json")
    assert f"path: {files}/x.tokenizer.json}}    # {tokenizer.vocab_size:,} ids" in capsys.readouterr().out
    found = documents(files / "x", tokenizer.decode)
    assert sorted(found) == sorted(WRITTEN)
    assert run(["data", "inspect", "x", "--tokenizer", "x.tokenizer.json"]) == 0
    assert repr(found[0][:20])[:-1] in capsys.readouterr().out
    assert run(["data", "build", "--output", "y", "--tokenizer", "x.tokenizer.json", "b.txt"]) == 0
    assert documents(files / "y", tokenizer.decode) == ["a whole file"]


def test_every_fault_of_the_arguments_at_once(files, capsys):
    assert run(["data", "build", "--output", "x", "--byte", "b.txt"]) == 0
    before = (files / "x.bin").read_bytes()
    assert run(["data", "build", "--output", "x", "no.txt", "nor.txt"]) == 2
    told = capsys.readouterr().err
    for part in ("no.txt: there is no such file", "nor.txt", "say how to tokenise", "x: the dataset exists already"):
        assert part in told
    assert run(["data", "build", "--output", "x", "--byte", "--train-bpe", "300", "--overwrite", "b.txt"]) == 2
    assert "more than one way to tokenise" in capsys.readouterr().err
    assert (files / "x.bin").read_bytes() == before
    (files / "b.txt").write_text("something else")
    assert run(["data", "build", "--output", "x", "--byte", "--overwrite", "b.txt"]) == 0
    assert bytes(IndexedDataset(files / "x").read(0, 9).astype("u1")) == b"something"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"body": "a"}\n{"body":\n', "a.jsonl:2: is not JSON"),
        ('{"text": "a"}\n', "has no key 'body'"),
        ("\n", "empty"),
    ],
)
def test_bad_text_leaves_no_output(files, capsys, content, message):
    (files / "a.jsonl").write_text(content)
    assert run(["data", "build", "--output", "x", "--byte", "--json-key", "body", "a.jsonl"]) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in files.iterdir()) == ["a.jsonl", "b.txt"]


def test_an_output_that_cannot_be_written_is_a_fault_of_the_machine(files, capsys):
    assert run(["data", "build", "--output", "b.txt/x", "--byte", "b.txt"]) == 3
    assert "b.txt/x cannot be written" in capsys.readouterr().err


def test_inspect_refuses_what_is_no_dataset(files, capsys):
    assert run(["data", "inspect", "none"]) == 2
    assert "none.idx: there is no such file" in capsys.readouterr().err


def test_lines_tell_the_progress_where_there_is_no_terminal(files, capsys, monkeypatch):
    monkeypatch.setattr("camshaft.cli.data._LINE_EVERY_S", 0.0)
    assert run(["data", "build", "--output", "x", "--byte", "b.txt"]) == 0
    assert "tokenising: 0.0 of 0.0 MB" in capsys.readouterr().err


def test_a_bar_tells_it_on_a_terminal_and_results_stay_on_stdout(files):
    here, there = pty.openpty()
    command = [sys.executable, "-m", "camshaft", "data", "build", "--output", "x", "--train-bpe", "270", "b.txt"]
    process = subprocess.Popen(
        [*command, "--workers", "1"],
        stdout=subprocess.PIPE,
        stderr=there,
        env={**os.environ, "TERM": "xterm"},
        text=True,
    )
    os.close(there)
    shown = b""
    try:
        while part := os.read(here, 4096):
            shown += part
    except OSError:  # Linux: the other side is closed
        pass
    finally:
        os.close(here)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out.startswith("1 documents")
    assert b"tokenising" in shown
    assert b"training the tokenizer" in shown
    assert b"\x1b[" in shown
