"""Megatron's indexed format: layout to the byte, round trips, and every way in which a file can be damaged."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest

from camshaft.data.indexed import IndexedDataset, dtype_for
from camshaft.data.writer import IndexedWriter
from camshaft.errors import RecipeError

DOCUMENTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
MAGIC, VERSION, CODE, SEQUENCES, ENTRIES, SIZES = 0, 9, 17, 18, 26, 34


def by_hand(documents, *, code=8, letter="H"):
    """The two files as the format's description says, built with struct only."""
    sizes = [len(one) for one in documents]
    width = struct.calcsize(letter)
    pointers = [sum(sizes[:number]) * width for number in range(len(sizes))]
    index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code)
    index += struct.pack("<QQ", len(sizes), len(sizes) + 1)
    index += struct.pack(f"<{len(sizes)}i", *sizes) + struct.pack(f"<{len(sizes)}q", *pointers)
    index += struct.pack(f"<{len(sizes) + 1}q", *range(len(sizes) + 1))
    tokens = [token for one in documents for token in one]
    return index, struct.pack(f"<{len(tokens)}{letter}", *tokens)


def put(folder, index, tokens):
    (folder / "x.idx").write_bytes(index)
    (folder / "x.bin").write_bytes(tokens)
    return folder / "x"


def write(prefix, documents, dtype):
    with IndexedWriter(prefix, dtype) as writer:
        for one in documents:
            writer.add(one)


def read_all(data):
    return [data.read(data.start(n), data.start(n + 1)).tolist() for n in range(data.documents)]


@pytest.mark.parametrize(("vocab", "code", "letter"), [(65499, 8, "H"), (65500, 4, "i"), (None, 4, "i")])
def test_written_files_are_the_format_to_the_byte(tmp_path, vocab, code, letter):
    write(tmp_path / "x", DOCUMENTS, dtype_for(vocab))
    index, tokens = by_hand(DOCUMENTS, code=code, letter=letter)
    assert (tmp_path / "x.idx").read_bytes() == index
    assert (tmp_path / "x.bin").read_bytes() == tokens
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx"]


@pytest.mark.parametrize(("code", "letter"), [(1, "B"), (3, "h"), (4, "i"), (5, "q"), (8, "H")])
def test_every_integer_type_is_read(tmp_path, code, letter):
    data = IndexedDataset(put(tmp_path, *by_hand(DOCUMENTS, code=code, letter=letter)))
    assert (data.sequences, data.documents, data.tokens) == (3, 3, 9)
    assert read_all(data) == DOCUMENTS
    assert data.starts(0, 4).tolist() == [0, 3, 4, 9]
    assert data.read(2, 6).dtype == np.int64


def test_round_trip_of_many_ragged_documents_with_empty_ones(tmp_path):
    rng = np.random.default_rng(3)
    documents = [rng.integers(0, 70000, size).tolist() for size in rng.integers(0, 40, 500)]
    documents[0] = documents[-1] = []
    write(tmp_path / "x", documents, np.dtype("<i4"))
    data = IndexedDataset(tmp_path / "x")
    assert read_all(data) == documents
    assert data.tokens == sum(map(len, documents))


def test_several_sequences_make_one_document(tmp_path):
    index, tokens = by_hand(DOCUMENTS)
    index = index[:ENTRIES] + struct.pack("<Q", 3) + index[SIZES : SIZES + 3 * 12] + struct.pack("<3q", 0, 2, 3)
    data = IndexedDataset(put(tmp_path, index, tokens))
    assert (data.sequences, data.documents) == (3, 2)
    assert read_all(data) == [[5, 6, 7, 8], [9, 10, 11, 12, 13]]


def patched(index, offset, new):
    return index[:offset] + new + index[offset + len(new) :]


INDEX, TOKENS = by_hand(DOCUMENTS)
POINTERS, DOC_INDEX = SIZES + 4 * 3, SIZES + 12 * 3
DAMAGED = {
    "magic": (patched(INDEX, MAGIC, b"TNTIDX"), TOKENS, "not an indexed dataset"),
    "version": (patched(INDEX, VERSION, struct.pack("<Q", 2)), TOKENS, "version 2"),
    "float dtype": (patched(INDEX, CODE, b"\x06"), TOKENS, "dtype code 6 (float64)"),
    "unknown dtype": (patched(INDEX, CODE, b"\x63"), TOKENS, "dtype code 99 (unknown)"),
    "wider dtype": (patched(INDEX, CODE, b"\x04"), TOKENS, "starts at byte 6, its sizes say 12"),
    "more sequences": (patched(INDEX, SEQUENCES, struct.pack("<Q", 4)), TOKENS, "take 114 bytes, and the file has 102"),
    "huge count": (patched(INDEX, SEQUENCES, struct.pack("<Q", 1 << 60)), TOKENS, "and the file has 102"),
    "fewer documents": (patched(INDEX, ENTRIES, struct.pack("<Q", 3)), TOKENS, "take 94 bytes, and the file has 102"),
    "negative size": (patched(INDEX, SIZES + 4, struct.pack("<i", -1)), TOKENS, "sequence 1 has a negative size"),
    "other size": (patched(INDEX, SIZES, struct.pack("<i", 2)), TOKENS, "sequence 1 starts at byte 6, its sizes say 4"),
    "last size": (patched(INDEX, SIZES + 8, struct.pack("<i", 6)), TOKENS, "expects 20 bytes"),
    "pointer goes back": (patched(INDEX, POINTERS + 16, struct.pack("<q", 2)), TOKENS, "sequence 2 starts at byte 2"),
    "first document": (patched(INDEX, DOC_INDEX, struct.pack("<q", 1)), TOKENS, "runs from 1 to 3"),
    "last document": (patched(INDEX, DOC_INDEX + 24, struct.pack("<q", 2)), TOKENS, "runs from 0 to 2"),
    "document goes back": (patched(INDEX, DOC_INDEX + 8, struct.pack("<q", 3)), TOKENS, "goes back at document 1"),
    "cut header": (INDEX[:20], TOKENS, "at least 34 bytes, this file has 20"),
    "cut index": (INDEX[:-1], TOKENS, "take 102 bytes, and the file has 101"),
    "longer index": (INDEX + b"\x00" * 8, TOKENS, "and the file has 110"),
    "modes": (INDEX + b"\x00" * 3, TOKENS, "multimodal"),
    "truncated bin": (INDEX, TOKENS[:-2], "is truncated: the index expects 18 bytes (9 tokens of uint16), found 16"),
    "odd bin": (INDEX, TOKENS[:-1], "found 17"),
    "longer bin": (INDEX, TOKENS + b"\x00\x00", "is too long: the index expects 18 bytes"),
    "empty bin": (INDEX, b"", "found 0"),
    "no documents": (*by_hand([]), "holds no documents"),
    "no tokens": (*by_hand([[], []]), "holds no tokens"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_named(tmp_path, name):
    index, tokens, message = DAMAGED[name]
    prefix = put(tmp_path, index, tokens)
    with pytest.raises(RecipeError) as caught:
        IndexedDataset(prefix)
    (problem,) = caught.value.problems
    assert message in problem.message
    assert problem.file == str(prefix) + (".bin" if "bin" in name or name == "last size" else ".idx")
    assert caught.value.exit_status == 2


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_missing_file_is_named(tmp_path, suffix):
    prefix = put(tmp_path, INDEX, TOKENS)
    (tmp_path / f"x.{suffix}").unlink()
    with pytest.raises(RecipeError, match=rf"x\.{suffix}: there is no such file"):
        IndexedDataset(prefix)


def test_a_file_that_shrinks_while_open_is_an_error_not_a_signal(tmp_path):
    data = IndexedDataset(put(tmp_path, INDEX, TOKENS))
    os.truncate(tmp_path / "x.bin", 8)
    assert data.read(0, 4).tolist() == [5, 6, 7, 8]
    with pytest.raises(RecipeError, match="ends at byte 8"):
        data.read(3, 6)


@pytest.mark.parametrize(("bad", "dtype"), [(65536, "<u2"), (-1, "<u2"), (1 << 31, "<i4")])
def test_ids_that_do_not_fit_are_refused_and_nothing_is_left(tmp_path, bad, dtype):
    with (
        pytest.raises(ValueError, match=f"id {bad} of document 1"),
        IndexedWriter(tmp_path / "x", np.dtype(dtype)) as w,
    ):
        w.add([1, 2])
        w.add([3, bad])
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_the_middle_leaves_an_older_dataset_alone(tmp_path):
    write(tmp_path / "x", DOCUMENTS, dtype_for(100))
    with pytest.raises(ZeroDivisionError), IndexedWriter(tmp_path / "x", dtype_for(100)) as writer:
        writer.add([1])
        raise ZeroDivisionError
    assert read_all(IndexedDataset(tmp_path / "x")) == DOCUMENTS
    write(tmp_path / "x", [[1]], dtype_for(100))
    assert read_all(IndexedDataset(tmp_path / "x")) == [[1]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx"]


def test_a_crash_while_a_dataset_is_replaced_never_leaves_a_pair_that_does_not_belong_together(tmp_path, monkeypatch):
    write(tmp_path / "x", DOCUMENTS, dtype_for(100))
    original = Path.replace

    def crash(path, target):
        if target.suffix == ".idx":
            raise OSError(5, "crash")
        return original(path, target)

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(OSError, match="crash"):
        write(tmp_path / "x", [[9, 8, 7], [6], [1, 2, 3, 4, 5]], dtype_for(100))  # the same sizes
    with pytest.raises(RecipeError, match=r"x\.idx: there is no such file"):
        IndexedDataset(tmp_path / "x")


@pytest.mark.parametrize("place", [0, 1, 50_000, 99_998, 99_999])
def test_ids_above_the_vocabulary_are_found_at_both_ends_and_between(tmp_path, place):
    ids = np.arange(100_000) % 300
    ids[place] = 300
    write(tmp_path / "x", [ids], np.dtype("<i4"))
    data = IndexedDataset(tmp_path / "x")
    data.check_ids(301)
    with pytest.raises(RecipeError, match=rf"token {place} \(byte {4 * place}\) has id 300, .* ids 0 to 299"):
        data.check_ids(300)


def test_negative_ids_are_refused(tmp_path):
    data = IndexedDataset(put(tmp_path, *by_hand([[1, 2, -3]], code=4, letter="i")))
    with pytest.raises(RecipeError, match=r"token 2 .* has id -3"):
        data.check_ids(100)


def test_a_big_file_is_looked_at_in_pieces_from_end_to_end(tmp_path):
    ids = np.zeros(1 << 16, np.int64)
    ids[-1] = 9
    write(tmp_path / "x", [ids], np.dtype("<u2"))
    data = IndexedDataset(tmp_path / "x")
    with pytest.raises(RecipeError, match="token 65535 "):
        data.check_ids(9, limit_bytes=1 << 12)


def test_fingerprint_changes_with_one_token(tmp_path):
    found = set()
    for last in (1, 2):
        write(tmp_path / "x", [[7, last]], dtype_for(10))
        found.add(IndexedDataset(tmp_path / "x").fingerprint())
    assert len(found) == 2
