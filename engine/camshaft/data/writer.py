"""Megatron's indexed dataset: the writer. See ``indexed`` for the format."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
from numpy.typing import ArrayLike

from camshaft.data.indexed import CODES, HEADER, MAGIC, VERSION, bin_path, idx_path

_CHUNK = 1 << 20


class IndexedWriter:
    """Writes documents one by one, each as one sequence, in constant memory.

    Both files appear under their names only when the ``with`` block ends without an error. The index comes
    last, so a prefix that has an index is complete; an index that is replaced is removed before its
    ``.bin`` is.

    Args:
        prefix: path without ``.bin`` and ``.idx``; its folder must exist.
        dtype: integer type of the ids in the file, see ``indexed.dtype_for``.
    """

    def __init__(self, prefix: Path, dtype: np.dtype[np.integer]) -> None:
        self.prefix, self.dtype = prefix, dtype.newbyteorder("<")
        self.documents = self.tokens = 0
        self._code = next(code for code, name in CODES.items() if name == dtype.name)
        self._temporary = {
            kind: prefix.with_name(f".{prefix.name}.{kind}.{os.getpid()}") for kind in ("bin", "idx", "sizes")
        }

    def __enter__(self) -> Self:
        self._bin: BinaryIO = self._temporary["bin"].open("wb", buffering=_CHUNK)
        self._sizes: BinaryIO = self._temporary["sizes"].open("wb", buffering=1 << 16)
        return self

    def add(self, ids: ArrayLike) -> None:
        """Append one document.

        Raises:
            ValueError: an id does not fit the dtype, or the document has 2^31 tokens or more.
        """
        tokens = np.asarray(ids, dtype=np.int64)
        limits = np.iinfo(self.dtype)
        if tokens.size and (tokens.max() > limits.max or tokens.min() < limits.min):
            bad = tokens[(tokens > limits.max) | (tokens < limits.min)][0]
            raise ValueError(f"id {bad} of document {self.documents} does not fit {self.dtype.name}")
        if tokens.size >= 1 << 31:
            raise ValueError(f"document {self.documents} has {tokens.size} tokens; the format allows {(1 << 31) - 1}")
        self._bin.write(tokens.astype(self.dtype).tobytes())
        self._sizes.write(np.array(tokens.size, "<i4").tobytes())
        self.documents += 1
        self.tokens += tokens.size

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._sizes.close()
            if kind is None:
                _sync(self._bin)
                self._write_index()
                self._publish()
        finally:
            self._bin.close()
            for path in self._temporary.values():
                path.unlink(missing_ok=True)

    def _write_index(self) -> None:
        with self._temporary["idx"].open("wb") as index, self._temporary["sizes"].open("rb") as sizes:
            index.write(MAGIC + HEADER.pack(VERSION, self._code, self.documents, self.documents + 1))
            shutil.copyfileobj(sizes, index, _CHUNK)
            sizes.seek(0)
            place = 0
            while part := sizes.read(4 * _CHUNK):
                lengths = np.frombuffer(part, "<i4").astype(np.int64) * self.dtype.itemsize
                ends = place + np.cumsum(lengths)
                index.write((ends - lengths).astype("<i8").tobytes())
                place = int(ends[-1])
            for start in range(0, self.documents + 1, _CHUNK):
                index.write(np.arange(start, min(start + _CHUNK, self.documents + 1), dtype="<i8").tobytes())
            _sync(index)

    def _publish(self) -> None:
        idx_path(self.prefix).unlink(missing_ok=True)
        self._temporary["bin"].replace(bin_path(self.prefix))
        self._temporary["idx"].replace(idx_path(self.prefix))


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
