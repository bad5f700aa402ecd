"""Megatron's indexed dataset, ``PREFIX.bin`` and ``PREFIX.idx``: the reader.

``.bin`` holds the token ids of all sequences one after another. ``.idx``, little-endian, holds: 9 bytes
``MMIDIDX\\0\\0``, version uint64 = 1, dtype code uint8, number of sequences N uint64, length D of the
document index uint64 (documents + 1), sizes int32[N] in tokens, pointers int64[N] in bytes, document index
int64[D] (sequence at which each document starts, ending with N). Source: NVIDIA/Megatron-LM,
``megatron/core/datasets/indexed_dataset.py``.
"""

from __future__ import annotations

import hashlib
import os
import struct
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np

from camshaft.data.samples import Ids
from camshaft.errors import Problem, RecipeError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<QBQQ")
CODES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
_CHUNK = 1 << 20


def dtype_for(vocab_size: int | None) -> np.dtype[np.integer]:
    """Megatron's choice: uint16 for vocabularies below 65500, else int32."""
    return np.dtype("<u2" if vocab_size is not None and vocab_size < 65500 else "<i4")


def bin_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".idx")


class IndexedDataset:
    """A checked, open indexed dataset.

    The index is memory-mapped. Tokens are read with ``pread`` rather than through a map: a file that
    shrinks under a running job is then an error with a name, not a SIGBUS.

    ``dtype``: of the ids in the file; ``sequences``, ``documents``, ``tokens``: how many there are.

    Raises:
        RecipeError: a file is missing, truncated, altered or of another format; names the file and what is
        wrong.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix, self.bin, self.idx = prefix, bin_path(prefix), idx_path(prefix)
        for path in (self.idx, self.bin):
            if not path.is_file():
                raise RecipeError(
                    Problem("there is no such file", file=str(path), fix="give the path without '.bin' and '.idx'")
                )
        self._map_index()
        self._check_pointers()
        self._check_documents()
        self._open_bin()

    def _fail(self, message: str, path: Path | None = None) -> NoReturn:
        raise RecipeError(Problem(message, file=str(path or self.idx), fix="build it again with 'camshaft data build'"))

    def _map_index(self) -> None:
        size, start = self.idx.stat().st_size, len(MAGIC) + HEADER.size
        if size < start:
            self._fail(f"an index has at least {start} bytes, this file has {size}")
        raw = np.memmap(self.idx, dtype=np.uint8, mode="r")
        if bytes(raw[: len(MAGIC)]) != MAGIC:
            self._fail(f"starts with {bytes(raw[: len(MAGIC)])!r}, not with {MAGIC!r}: not an indexed dataset")
        version, code, self.sequences, entries = HEADER.unpack(bytes(raw[len(MAGIC) : start]))
        if version != VERSION:
            self._fail(f"has version {version}; only version {VERSION} is known")
        if not CODES.get(code, "float").startswith(("int", "uint")):
            self._fail(f"has dtype code {code} ({CODES.get(code, 'unknown')}), which is no integer type")
        self.dtype = np.dtype(CODES[code]).newbyteorder("<")
        expected = start + 12 * self.sequences + 8 * entries
        if size != expected:
            self._fail(
                f"{self.sequences} sequences and {entries} document index entries take {expected} bytes,"
                f" and the file has {size}"
                + (" (it holds sequence modes: multimodal data)" if size == expected + self.sequences else "")
            )
        if entries < 2 or self.sequences == 0:
            self._fail("holds no documents")
        self.documents = entries - 1
        self._sizes = np.frombuffer(raw, "<i4", self.sequences, start)
        self._pointers = np.frombuffer(raw, "<i8", self.sequences, start + 4 * self.sequences)
        self._document_index = np.frombuffer(raw, "<i8", entries, start + 12 * self.sequences)

    def _check_pointers(self) -> None:
        width, expected = self.dtype.itemsize, 0
        for start in range(0, self.sequences, _CHUNK):
            sizes = self._sizes[start : start + _CHUNK].astype(np.int64)
            pointers = self._pointers[start : start + _CHUNK]
            if sizes.min() < 0:
                self._fail(f"sequence {start + int(np.argmax(sizes < 0))} has a negative size")
            ends = expected + np.cumsum(sizes) * width
            wanted = ends - sizes * width
            if not np.array_equal(pointers, wanted):
                bad = int(np.argmax(pointers != wanted))
                self._fail(f"sequence {start + bad} starts at byte {pointers[bad]}, its sizes say {wanted[bad]}")
            expected = int(ends[-1])
        self.tokens = expected // width
        if self.tokens == 0:
            self._fail("holds no tokens")

    def _check_documents(self) -> None:
        first, last = self._document_index.item(0), self._document_index.item(self.documents)
        if first != 0 or last != self.sequences:
            self._fail(f"the document index runs from {first} to {last}, not from 0 to {self.sequences}")
        for start in range(0, self.documents, _CHUNK):
            steps = np.diff(self._document_index[start : start + _CHUNK + 1])
            if steps.min() < 0:
                self._fail(f"the document index goes back at document {start + int(np.argmax(steps < 0))}")

    def _open_bin(self) -> None:
        found, expected = self.bin.stat().st_size, self.tokens * self.dtype.itemsize
        if found != expected:
            self._fail(
                f"{'is truncated' if found < expected else 'is too long'}: the index expects {expected} bytes"
                f" ({self.tokens} tokens of {self.dtype.name}), found {found}",
                self.bin,
            )
        self._file = os.open(self.bin, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._file)

    def start(self, document: int) -> int:
        """Token at which ``document`` starts; ``documents`` gives the end of the last one."""
        sequence = self._document_index.item(document)
        if sequence == self.sequences:
            return self.tokens
        return int(self._pointers.item(sequence)) // self.dtype.itemsize

    def starts(self, first: int, stop: int) -> Ids:
        """Tokens at which documents ``first`` to ``stop`` - 1 start, int64; ``stop`` may be ``documents`` +
        1.
        """
        sequences = self._document_index[first:stop]
        inside = np.minimum(sequences, self.sequences - 1)
        found: Ids = self._pointers[inside] // self.dtype.itemsize
        found[sequences == self.sequences] = self.tokens
        return found

    def read(self, start: int, stop: int) -> Ids:
        """Tokens ``start`` to ``stop`` - 1 as int64.

        Raises:
            RecipeError: the file no longer has them.
        """
        width = self.dtype.itemsize
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.tokens}")
        parts, place, end = [], start * width, stop * width
        while place < end:
            part = os.pread(self._file, end - place, place)
            if not part:
                self._fail(f"ends at byte {place}, and tokens up to byte {end} were there at the start", self.bin)
            parts.append(part)
            place += len(part)
        return np.frombuffer(b"".join(parts), self.dtype).astype(np.int64)

    def pieces(self, limit_bytes: int = 64 << 20) -> Iterator[tuple[int, Ids]]:
        """(place, tokens) of up to ``limit_bytes`` of tokens, spread evenly over the file from end to end."""
        budget = max(64, limit_bytes // self.dtype.itemsize)
        count = 1 if self.tokens <= budget else 64
        piece = min(self.tokens, budget) // count
        for number in range(count):
            start = (self.tokens - piece) * number // max(1, count - 1)
            for place in range(start, start + piece, _CHUNK):
                yield place, self.read(place, min(place + _CHUNK, start + piece))

    def check_ids(self, vocab_size: int, limit_bytes: int = 64 << 20) -> None:
        """Look for ids outside the vocabulary in ``pieces(limit_bytes)``.

        Raises:
            RecipeError: naming the id and its place.
        """
        for place, ids in self.pieces(limit_bytes):
            self.refuse_outside(ids, vocab_size, place)

    def id_range(self) -> tuple[int, int]:
        """Lowest and highest id in ``pieces()``."""
        ranges = [(int(ids.min()), int(ids.max())) for _, ids in self.pieces() if ids.size]
        return min(low for low, _ in ranges), max(high for _, high in ranges)

    def refuse_outside(self, ids: Ids, vocab_size: int, place: int) -> None:
        """Raise RecipeError if one of ``ids``, which were read at token ``place``, is no id of the
        vocabulary.
        """
        # As unsigned numbers negative ids are above every vocabulary, so one reduction finds both kinds.
        if ids.size and int(ids.view(np.uint64).max()) >= vocab_size:
            bad = int(np.argmax(ids.view(np.uint64) >= vocab_size))
            raise RecipeError(
                Problem(
                    f"token {place + bad} (byte {(place + bad) * self.dtype.itemsize}) has id {ids[bad]},"
                    f" and the vocabulary has ids 0 to {vocab_size - 1}",
                    file=str(self.bin),
                    fix="set model.vocab_size to the vocabulary that the data was tokenised with",
                )
            )

    def fingerprint(self) -> str:
        """sha256 of the sizes, of the header, and of 64 pieces of 64 KiB spread over each file."""
        digest = hashlib.sha256()
        for path in (self.idx, self.bin):
            size, piece = path.stat().st_size, 1 << 16
            digest.update(struct.pack("<Q", size))
            with path.open("rb") as file:
                for number in range(64 if size > 64 * piece else 1):
                    file.seek(max(0, size - piece) * number // 63 if size > 64 * piece else 0)
                    digest.update(file.read(piece if size > 64 * piece else size))
        return digest.hexdigest()
