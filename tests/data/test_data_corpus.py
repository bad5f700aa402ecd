"""Corpora and tokenizers: what counts as a document, what is refused, and that ids stand for the text's bytes."""

from __future__ import annotations

import json
import random
import sys

import numpy as np
import pytest

from camshaft.data.build import batches, write_tokens
from camshaft.data.corpus import TextFiles
from camshaft.data.indexed import IndexedDataset
from camshaft.data.stdlib import StandardLibrary
from camshaft.data.tokenizer import EOD, ByteTokenizer, FileTokenizer, train_bpe
from camshaft.errors import MachineError, RecipeError

TEXTS = [
    "The valve opens at the exact moment of each stroke.",
    "naïve façade, 東京, Ελλάδα, \U0001f600 and a tab\tand\r\nlines\n\n",
    f"the marker {EOD} in a text is text, and so are <s> and \x00",
    "  leading and trailing spaces  ",
    "x" * 500,
]


@pytest.fixture(scope="module")
def bpe_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    path.write_text(train_bpe(TEXTS * 3, 400))
    return path


def lines(folder, *records, name="a.jsonl"):
    path = folder / name
    path.write_bytes(b"".join(one if isinstance(one, bytes) else json.dumps(one).encode() + b"\n" for one in records))
    return path


def test_ragged_json_lines_give_every_text_once_in_an_order_of_its_own(tmp_path):
    """Blank lines, blank texts, other keys, CRLF, escapes, no newline at the end."""
    wanted = [f"text {number} " + "é" * (number % 7) for number in range(40)]
    records = [{"id": number, "text": text, "meta": {"text": "no"}} for number, text in enumerate(wanted)]
    path = lines(
        tmp_path,
        *records,
        b"\n",
        b"  \r\n",
        {"text": "  \n"},
        b'{"text": "last \\u00fc\\ud83d\\ude00"}\r\n',
        b'{"text":"end"}',
    )
    plain = tmp_path / "b.txt"
    plain.write_text("\ufeffa whole file\nis one document\n")
    blank = tmp_path / "c.txt"
    blank.write_text(" \n")
    corpus = TextFiles([path, plain, blank])
    expected = [*wanted, "last ü\U0001f600", "end", "a whole file\nis one document\n"]
    assert list(corpus.in_order()) == expected
    shuffled = list(corpus.documents())
    assert sorted(shuffled) == sorted(expected)
    assert shuffled != expected
    assert shuffled == list(TextFiles([path, plain, blank]).documents())
    assert corpus.size() == sum(file.stat().st_size for file in (path, plain, blank))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b'{"text": "a"\n', "is not JSON"),
        (b"[1, 2]\n", "is a JSON list, not an object"),
        (b'"text"\n', "is a JSON str, not an object"),
        (b'{"content": "a", "n": 1}\n', "has no key 'text' (it has 'content', 'n')"),
        (b"{}\n", "has no key 'text' (it has nothing)"),
        (b'{"text": 5}\n', "'text' is a int, not text"),
        (b'{"text": null}\n', "'text' is a NoneType, not text"),
        (b'{"text": "\xff"}\n', "is not UTF-8: invalid start byte at byte 10"),
        (b'{"text": "half \\ud83d"}\n', "half of a surrogate pair"),
        (b"[" * 100_000 + b"\n", "is not JSON"),
    ],
)
def test_bad_lines_name_file_and_line(tmp_path, bad, message):
    path = lines(tmp_path, {"text": "good"}, b"\n", bad, {"text": "good"})
    for read in (TextFiles([path]).documents, TextFiles([path]).in_order):
        with pytest.raises(RecipeError) as caught:
            list(read())
        (problem,) = caught.value.problems
        assert (problem.file, problem.line) == (str(path), 3)
        assert message in problem.message
        assert problem.fix


def test_text_that_is_not_utf8_and_files_that_are_missing_are_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes("ärger".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"a\.txt: is not UTF-8: .* at byte 0"):
        list(TextFiles([tmp_path / "a.txt"]).documents())
    for name in ("none.txt", "none.jsonl"):
        corpus = TextFiles([tmp_path / name])
        for read in (lambda corpus=corpus: list(corpus.documents()), corpus.key):
            with pytest.raises(RecipeError, match=rf"{name}: cannot be read: No such file"):
                read()


def test_key_of_a_corpus_depends_on_content_order_and_json_key(tmp_path):
    one, two = lines(tmp_path, {"text": "a"}), lines(tmp_path, {"text": "b"}, name="b.jsonl")
    keys = [
        TextFiles(files, key).key() for files, key in (([one, two], "text"), ([two, one], "text"), ([one, two], "t"))
    ]
    assert len(set(keys)) == 3
    assert TextFiles([one, two]).key() == keys[0]
    lines(tmp_path, {"text": "c"})
    assert TextFiles([one, two]).key() != keys[0]


def test_python_docs_are_real_prose(tmp_path):
    corpus = StandardLibrary("python-docs")
    documents = list(corpus.documents())
    assert len(documents) == len(set(documents)) > 2000
    assert 1_200_000 < sum(len(text.encode()) for text in documents) < 4_000_000
    assert 0.4 < sum(len(text.encode()) for text in documents) / corpus.size() < 2.5
    assert any('The "try" statement' in text for text in documents), "a topic"
    assert any(text.startswith("Return the absolute value") or "json" in text.lower() for text in documents)
    assert min(map(len, documents)) > 10
    assert corpus.key() == StandardLibrary("python-docs").key() != StandardLibrary("python-source").key()


def test_no_module_of_the_library_is_imported_to_read_it():
    before = set(sys.modules)
    list(StandardLibrary("python-source").documents())
    assert not {"antigravity", "this", "idlelib", "turtle"} & (set(sys.modules) - before)


def library(root):
    for name, text in {
        "pydoc_data/topics.py": "topics = {'if': 'The if statement, " + "x" * 90 + "'}\n",
        "good.py": '"""'
        + "Module text. " * 20
        + '"""\ndef f():\n    """'
        + "Function text. " * 20
        + '"""\n    """not a docstring"""\n',
        "short.py": '"""Too short."""\n',
        "same.py": '"""' + "Module text. " * 20 + '"""\n',
        "broken.py": "def (:\n",
        "odd.py": '"""' + "bad escape \\d " * 20 + '"""\n',
        "empty.py": "",
        "site-packages/other.py": '"""' + "Not ours. " * 20 + '"""\n',
        "test/test_x.py": '"""' + "A test. " * 20 + '"""\n',
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_what_counts_as_a_document_of_the_library(tmp_path):
    library(tmp_path)
    heads = sorted(text.split(",")[0][:12] for text in StandardLibrary("python-docs", tmp_path).documents())
    assert heads == ["Function tex", "Module text.", "The if state", "bad escape \\"]
    again = [list(StandardLibrary("python-docs", tmp_path).documents()) for _ in range(2)]
    assert again[0] == again[1]
    sources = list(StandardLibrary("python-source", tmp_path).documents())
    assert len(sources) == 6
    assert not any("Not ours" in text or "A test" in text for text in sources)
    before = StandardLibrary("python-docs", tmp_path).key()
    (tmp_path / "good.py").write_text("pass\n")
    assert StandardLibrary("python-docs", tmp_path).key() != before


def test_a_python_without_its_source_is_a_fault_of_the_machine(tmp_path):
    with pytest.raises(MachineError, match="holds no source of Python's library"):
        list(StandardLibrary("python-docs", tmp_path).documents())
    (tmp_path / "a.py").write_text("pass")
    with pytest.raises(MachineError, match="python-docs"):
        StandardLibrary("python-docs", tmp_path).key()
    assert list(StandardLibrary("python-source", tmp_path).documents()) == ["pass"]


def check_round_trip(tokenizer):
    ids = tokenizer.encode_batch(TEXTS)
    table = tokenizer.token_bytes()
    assert table.shape == (tokenizer.vocab_size,)
    assert table[tokenizer.eod_id] == 0
    for text, found in zip(TEXTS, ids, strict=True):
        assert tokenizer.decode(found.tolist()) == text
        assert table[found].sum() == len(text.encode())
        assert tokenizer.eod_id not in found
        assert found.dtype == np.int64
        assert found.max() < tokenizer.vocab_size


def test_bytes_of_ids_add_up_to_the_text_for_bytes():
    check_round_trip(ByteTokenizer())
    assert ByteTokenizer().decode([104, 105, 256, 255]) == "hi\ufffd"


def test_bytes_of_ids_add_up_to_the_text_for_bpe(bpe_file):
    tokenizer = FileTokenizer(bpe_file)
    check_round_trip(tokenizer)
    assert 257 < tokenizer.vocab_size <= 400
    bigger = FileTokenizer(bpe_file, 5000)
    assert bigger.vocab_size == 5000
    check_round_trip(bigger)
    assert bigger.fingerprint != tokenizer.fingerprint == FileTokenizer(bpe_file).fingerprint


def test_training_is_deterministic_and_learns():
    first = train_bpe(TEXTS * 3, 300)
    assert first == train_bpe(iter(TEXTS * 3), 300)
    assert len(json.loads(first)["model"]["vocab"]) == 300
    assert len(json.loads(train_bpe([], 300))["model"]["vocab"]) == 257


def tokenizer_file(path, *, tokens, special=("</s>",), **sections):
    vocabulary = {token: number for number, token in enumerate([*special, *tokens])}
    added = [
        {"id": vocabulary[name], "content": name, "special": True, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False}
        for name in special
    ]  # fmt: skip
    model = {"type": "BPE", "vocab": vocabulary, "merges": [], "byte_fallback": "byte_fallback" in sections}
    sections.pop("byte_fallback", None)
    path.write_text(json.dumps({"version": "1.0", "added_tokens": added, "model": model, **sections}))
    return path


def test_a_sentencepiece_like_file_counts_bytes_too(tmp_path):
    path = tokenizer_file(
        tmp_path / "t.json",
        tokens=["▁", "a", "b", "ü", *(f"<0x{value:02X}>" for value in range(256))],
        decoder={"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        normalizer={"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        byte_fallback=True,
    )
    tokenizer = FileTokenizer(path)
    text = "a bü 東a"
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert tokenizer.eod_id == 0


def test_a_file_of_another_kind_has_no_byte_counts(tmp_path):
    path = tokenizer_file(tmp_path / "t.json", tokens=["a", "b"], pre_tokenizer={"type": "Whitespace"})
    assert FileTokenizer(path).token_bytes() is None


def test_tokenizer_files_that_cannot_be_used(tmp_path):
    bad = tmp_path / "t.json"
    with pytest.raises(RecipeError, match=r"t\.json: cannot be read"):
        FileTokenizer(bad)
    for content in (b"{", b"{}", b"[1]", b"\xff\xfe", b'{"version": "1.0"}'):
        bad.write_bytes(content)
        with pytest.raises(RecipeError, match=r"t\.json: is no tokenizer\.json"):
            FileTokenizer(bad)
    with pytest.raises(RecipeError, match=r"none of the tokens <\|endoftext\|>, </s>"):
        FileTokenizer(tokenizer_file(bad, tokens=["a"], special=("<pad>",)))


def test_write_tokens_ends_documents_with_eod_and_reports(tmp_path):
    texts, seen = ["abc", "", "wörld"], []
    built = write_tokens(
        texts, ByteTokenizer(), tmp_path / "x", total_bytes=9, progress=lambda *told: seen.append(told)
    )
    assert (built.documents, built.tokens, built.text_bytes) == (3, 12, 9)
    data = IndexedDataset(tmp_path / "x")
    assert data.dtype.itemsize == 2
    assert data.read(0, 12).tolist() == [*b"abc", 256, 256, *"wörld".encode(), 256]
    assert seen == [("tokenising", 9, 9)]
    with pytest.raises(RecipeError, match="corpus is empty"):
        write_tokens([], ByteTokenizer(), tmp_path / "y")
    assert not list(tmp_path.glob("*y*"))


def test_batches_are_bounded():
    rng = random.Random(0)
    texts = ["ü" * rng.randrange(200_000) for _ in range(80)]
    found = list(batches(texts))
    assert [text for batch, _ in found for text in batch] == texts
    assert all(size == sum(len(text.encode()) for text in batch) < (1 << 21) + 400_000 for batch, size in found)
    assert len(found) > 2
