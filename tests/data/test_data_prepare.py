"""From recipes to datasets: what is read, what is held out, and what a recipe's data can get wrong."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest

from camshaft import data
from camshaft.data.indexed import IndexedDataset
from camshaft.data.tokenizer import train_bpe
from camshaft.data.writer import IndexedWriter
from camshaft.errors import MachineError, RecipeError
from camshaft.recipe import check, load

FORK = multiprocessing.get_context("fork")
WORDS = [
    "camshaft",
    "valve",
    "stroke",
    "moment",
    "opens",
    "each",
    "exact",
    "the",
    "of",
    "a",
    "engine",
    "gradient",
    "token",
    "window",
]


def sentence(seed, size=30):
    rng = np.random.default_rng(seed)
    return " ".join(WORDS[index] for index in rng.integers(0, len(WORDS), size))


@pytest.fixture
def write(tmp_path):
    """Writes a recipe with this data section and loads it."""

    def make(source, *, tokenizer=None, model=None, seed=0, **sections):
        recipe = {
            "schema_version": 1,
            "name": "t",
            "seed": seed,
            "model": {"preset": "llama-tiny", **(model or {})},
            "data": {"train": source, "sequence_length": 32, "cache_dir": "cache", **sections.pop("data", {})},
            "batch": {"micro_batch_size": 1, "global_batch_size": 1},
            "training": {"max_steps": 1, **sections.pop("training", {})},
            "plugins": {"adamw": {"lr": 0.001}},
            **({} if tokenizer is None else {"tokenizer": tokenizer}),
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps(recipe, indent=1))  # JSON is YAML
        return load(path)

    return make


@pytest.fixture
def text(tmp_path):
    records = [json.dumps({"text": sentence(seed, 5 + seed % 40)}) for seed in range(120)]
    (tmp_path / "text.jsonl").write_text("\n".join(records))
    return {"files": ["text.jsonl"]}


def indexed(folder, name, documents, dtype="<u2"):
    with IndexedWriter(folder / name, np.dtype(dtype)) as writer:
        for one in documents:
            writer.add(one)
    return {"prefix": name}


def keys(problems):
    return [problem.key for problem in problems]


def tokens_of(dataset):
    return sorted(dataset.stream.read(0, len(dataset.stream)).tolist())


def test_text_is_tokenised_split_and_cached(write, text, tmp_path):
    resolved = write(text, tokenizer={"type": "bpe", "vocab_size": 300})
    assert data.check(resolved) == []
    assert data.vocab_size(resolved) == 300
    seen = []
    first = data.prepare(resolved, lambda *told: seen.append(told))
    assert {stage for stage, _, _ in seen} == {"training the tokenizer", "tokenising"}
    assert first.vocab_size == first.tokenizer.vocab_size == 300
    held, kept = first.validation.stream, first.train.stream
    assert (kept.first, kept.stop) == (0, held.first)
    assert held.stop == 120
    assert 0.01 < len(held) / (len(held) + len(kept)) < 0.12
    assert [path.name for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".")].count("digests") == 1
    texts = {json.loads(line)["text"] for line in (tmp_path / "text.jsonl").read_text().splitlines()}
    found = []
    for stream in (kept, held):
        for number in range(stream.documents):
            ids = stream.read(stream.start(number), stream.start(number + 1))
            assert ids[-1] == first.tokenizer.eod_id
            found.append(first.tokenizer.decode(ids.tolist()))
            assert first.token_bytes[ids].sum() == len(found[-1].encode())
    assert len(found) == 120
    assert set(found) == texts
    again = data.prepare(resolved, lambda *_: pytest.fail("built again"))
    assert again.fingerprint == first.fingerprint


def test_fingerprint_follows_what_is_read(write, text, tmp_path):
    def of(**sections):
        return data.prepare(write(text, **{"tokenizer": {"type": "byte"}, **sections})).fingerprint

    base = of()
    assert base == of() == of(seed=5)
    others = [
        of(data={"sequence_length": 16}),
        of(data={"pack": False}),
        of(data={"document_mask": False}),
        of(data={"validation_fraction": 0.2}),
        of(tokenizer={"type": "bpe", "vocab_size": 300}),
    ]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": sentence(n)}) for n in range(120)))
    assert len({base, *others, of()}) == 7


def test_indexed_data_without_tokenizer(write, tmp_path):
    part = indexed(tmp_path, "a", [[1, 2, 3] * 30 for _ in range(10)])
    resolved = write({"blend": [part]}, model={"vocab_size": 50})
    assert data.check(resolved) == []
    assert data.vocab_size(resolved) is None
    found = data.prepare(resolved)
    assert found.tokenizer is found.vocab_size is found.token_bytes is None
    assert len(found.train.stream) + len(found.validation.stream) == 900


def test_indexed_data_with_a_tokenizer_get_the_eod_that_they_lack(write, tmp_path):
    part = indexed(tmp_path, "a", [[1, 2, 3] * 30 for _ in range(10)])
    found = data.prepare(write({"blend": [part]}, tokenizer={"type": "byte"}, data={"validation_fraction": 0}))
    assert found.validation is None
    assert found.vocab_size == 257
    assert tokens_of(found.train) == sorted([*[1, 2, 3] * 300, *[256] * 10])


def test_blends_are_read_in_their_shares(write, tmp_path):
    parts = [indexed(tmp_path, name, [[value] * 50 for _ in range(20)]) for name, value in (("a", 1), ("b", 2))]
    blend = [{**parts[0], "weight": 3.0}, {**parts[1], "weight": 1.0}]
    resolved = write({"blend": blend}, model={"vocab_size": 50})
    assert data.check(resolved) == []
    found = data.prepare(resolved)
    drawn = [int(found.train.sample(n % len(found.train), n // len(found.train))[0][0]) for n in range(4000)]
    assert 0.7 < drawn.count(1) / 4000 < 0.8
    assert len(found.validation) >= 2


def test_a_validation_set_of_its_own(write, text, tmp_path):
    (tmp_path / "held.txt").write_text(sentence(999))
    resolved = write(text, tokenizer={"type": "bpe", "vocab_size": 300}, data={"validation": {"files": ["held.txt"]}})
    assert data.check(resolved) == []
    found = data.prepare(resolved)
    assert found.train.stream.documents == 120
    stream = found.validation.stream
    assert found.tokenizer.decode(stream.read(0, len(stream)).tolist()) == sentence(999)


def test_both_kinds_of_validation_set_are_one_too_many(write, text, tmp_path):
    (tmp_path / "held.txt").write_text(sentence(999))
    resolved = write(text, data={"validation": {"files": ["held.txt"]}, "validation_fraction": 0.1})
    assert keys(data.check(resolved)) == ["data.validation_fraction"]


def test_a_single_document_is_left_whole_unless_somebody_wants_to_validate(write, tmp_path):
    (tmp_path / "book.txt").write_text(sentence(1, 400))
    source, byte = {"files": ["book.txt"]}, {"type": "byte"}
    found = data.prepare(write(source, tokenizer=byte))
    assert found.validation is None
    assert len(found.train.stream) == (tmp_path / "book.txt").stat().st_size + 1
    for asked in ({"data": {"validation_fraction": 0.1}}, {"training": {"eval_every": 1}}):
        with pytest.raises(
            RecipeError, match=r"one document, which .* cannot split. Fix: set data.validation_fraction=0"
        ):
            data.prepare(write(source, tokenizer=byte, **asked))


def test_unpacked_data_are_one_document_a_sample(write, text):
    found = data.prepare(write(text, tokenizer={"type": "byte"}, data={"pack": False}))
    assert len(found.train) == found.train.stream.documents
    weights = {int((found.train.sample(n, 0)[1] >= 0).sum()) for n in range(len(found.train))}
    assert len(weights) > 1


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


def test_a_corpus_that_turns_out_too_short_is_refused_with_its_size(write, tmp_path):
    (tmp_path / "a.txt").write_text("the the the the the the the the")
    with pytest.raises(RecipeError, match=r"data\.train: holds 32 token.* in 1 document.*one sample takes 60"):
        data.prepare(write({"files": ["a.txt"]}, tokenizer={"type": "byte"}, data={"sequence_length": 60}))


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


def test_a_local_tokenizer_file_is_used(write, text, tmp_path):
    (tmp_path / "t.json").write_text(train_bpe([sentence(n) for n in range(9)], 300))
    resolved = write(text, tokenizer={"type": "file", "path": "t.json"})
    found = data.prepare(resolved)
    stream = found.train.stream
    words = set(found.tokenizer.decode(stream.read(0, stream.start(1)).tolist()).split())
    assert words <= set(WORDS)
    assert found.vocab_size == data.vocab_size(resolved) <= 300


def test_a_cache_that_cannot_be_written_is_a_fault_of_the_machine(write, text, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(MachineError, match="cannot be used"):
        data.prepare(write(text, tokenizer={"type": "byte"}))


def prepare_and_tell(resolved, pipe):
    built = []
    found = data.prepare(resolved, lambda *told: built.append(told))
    pipe.send((bool(built), found.fingerprint, found.train.stream.read(0, 50).tolist()))
    os._exit(0)


def test_two_ranks_prepare_at_once_and_read_the_same(write, text):
    resolved = write(text, tokenizer={"type": "bpe", "vocab_size": 300})
    ends = [FORK.Pipe(duplex=False) for _ in range(2)]
    processes = [FORK.Process(target=prepare_and_tell, args=(resolved, sender)) for _, sender in ends]
    for process in processes:
        process.start()
    told = [receiver.recv() if receiver.poll(30) else None for receiver, _ in ends]
    for process in processes:
        process.join(20)
    for end in (one for pair in ends for one in pair):
        end.close()
    assert sorted(built for built, _, _ in told) == [False, True]
    assert told[0][1:] == told[1][1:]


def prepare_slowly(resolved, started):
    def progress(stage, done, total):
        if stage == "tokenising":
            started.set()
            time.sleep(60)

    data.prepare(resolved, progress)


def test_a_killed_preparation_leaves_nothing_that_is_read(write, text, tmp_path):
    resolved, started = write(text, tokenizer={"type": "byte"}), FORK.Event()
    process = FORK.Process(target=prepare_slowly, args=(resolved, started))
    process.start()
    try:
        assert started.wait(20)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join(20)
    entries = [path for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".")]
    assert [path.name for path in entries] == ["digests"]
    found = data.prepare(resolved)
    assert found.train.stream.documents + found.validation.stream.documents == 120
    leftovers = [path for path in (tmp_path / "cache").iterdir() if path.is_dir() and path.name.startswith(".")]
    assert leftovers == []


def test_a_damaged_cache_entry_is_built_again(write, text, tmp_path):
    resolved = write(text, tokenizer={"type": "byte"})
    before = data.prepare(resolved)
    (binary,) = (tmp_path / "cache").glob("*/tokens.bin")
    os.truncate(binary, 100)
    after = data.prepare(resolved)
    assert after.fingerprint == before.fingerprint
    assert IndexedDataset(binary.with_suffix("")).tokens == len(after.train.stream) + len(after.validation.stream)


@pytest.mark.parametrize("pack", [True, False])
def test_real_data_reach_every_layout_in_the_same_order(write, text, tmp_path, pack):
    """Packed text, and a blend of two sets of uneven size, through loaders of 1, 2 and 4 ranks."""
    from camshaft.data.loader import Loader
    from camshaft.state import BatchPlan

    parts = [indexed(tmp_path, name, [[value] * 50 for _ in range(20 * value)]) for name, value in (("a", 1), ("b", 2))]
    sources = (text, {"type": "byte"}), ({"blend": [{**parts[0], "weight": 2.5}, parts[1]]}, {"type": "byte"})
    for source, tokenizer in sources:
        dataset = data.prepare(write(source, tokenizer=tokenizer, data={"pack": pack})).train
        stop = 2 * len(dataset) + 3
        seen = []
        for degree in (1, 2, 4):
            plan = BatchPlan(2, 16, 8 // degree)
            loaders = [Loader(dataset, plan, index=index, degree=degree, seed=4, stop=stop) for index in range(degree)]
            rows, samples = [], 0
            while (windows := [loader.next() for loader in loaders])[0] is not None:
                micro = [window.batches[m] for m in range(plan.accumulation) for window in windows]
                samples += windows[0].samples
                short = windows[0].samples % 16 or 16
                rows += np.concatenate([np.stack([b.tokens, b.labels], 1) for b in micro])[:short].tolist()
            for loader in loaders:
                loader.close()
            assert samples == len(rows) == stop
            seen.append(rows)
        assert seen[0] == seen[1] == seen[2]
        if pack and source is text:
            first = np.array(seen[0][: len(dataset)])
            tokens = len(dataset.stream)
            assert np.count_nonzero(first[:, 1] >= 0) == tokens - dataset.stream.documents
            padding = len(dataset) * 32 - tokens
            assert np.bincount(first[:, 0].ravel())[256] == dataset.stream.documents + padding


def test_everything_but_the_loader_is_free_of_torch():
    code = (
        "import sys, camshaft.data, camshaft.data.check, camshaft.data.blend, camshaft.data.prepare, camshaft.cli.data;"
        "assert not {'torch', 'tokenizers', 'deepspeed', 'wandb', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
