"""From recipes to datasets: what is read, what is held out, and who builds it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from data_files import WORDS, indexed, sentence

from camshaft import data
from camshaft.data.indexed import IndexedDataset
from camshaft.data.tokenizer import train_bpe
from camshaft.errors import MachineError, RecipeError

FORK = multiprocessing.get_context("fork")


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


def test_a_corpus_that_turns_out_too_short_is_refused_with_its_size(write, tmp_path):
    (tmp_path / "a.txt").write_text("the the the the the the the the")
    with pytest.raises(RecipeError, match=r"data\.train: holds 32 token.* in 1 document.*one sample takes 60"):
        data.prepare(write({"files": ["a.txt"]}, tokenizer={"type": "byte"}, data={"sequence_length": 60}))


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
