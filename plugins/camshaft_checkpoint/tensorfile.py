"""The safetensors container: its header is checked before anything that it says is believed. No torch.

Layout: 8 bytes little-endian header length, a JSON object name -> {dtype, shape, data_offsets}, then the raw
little-endian data without holes (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from camshaft.errors import CheckpointError

MAX_HEADER = 100 << 20
"""Longest header that is read, in bytes; the reference implementation has the same limit."""
ITEM_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
"""Bytes of one element by the format's dtype name."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file. ``begin`` and ``end`` count bytes from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def encode_header(entries: Mapping[str, Entry]) -> bytes:
    """Length and header, padded with spaces so that the data starts at a multiple of 8 bytes."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, entry in entries.items():
        table[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (entry.begin, entry.end)}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def layout(items: Sequence[tuple[str, str, tuple[int, ...]]]) -> dict[str, Entry]:
    """Place (name, dtype, shape) one after another; wide elements first, so that every tensor is aligned."""
    entries, position = {}, 0
    for name, dtype, shape in sorted(items, key=lambda item: (-ITEM_BYTES[item[1]], item[0])):
        end = position + math.prod(shape) * ITEM_BYTES[dtype]
        entries[name] = Entry(dtype, shape, position, end)
        position = end
    return entries


def read_header(path: Path) -> dict[str, Entry]:
    """Read and check the header of a safetensors file; no data is read, and no size in it is trusted.

    Raises:
        CheckpointError: not a well-formed safetensors file: header too long or no JSON, unknown dtype, sizes that
            contradict each other, data that overlaps, leaves holes or does not end with the file.
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise CheckpointError(f"{path}: header of {length} bytes in a file of {size}: not a safetensors file")
        text = stream.read(length)
    try:
        table = json.loads(text, object_pairs_hook=_unique)
        if not isinstance(table, dict):
            raise ValueError("the header is not an object")
        table.pop("__metadata__", None)
        entries = {name: _entry(name, fields) for name, fields in table.items()}
        _check_places(entries, size - 8 - length)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: bad safetensors header: {error}") from error
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name occurs twice")
    return table


def naturals(value: Any) -> tuple[int, ...]:
    """A JSON list of integers that are not negative. Raises ValueError for anything else."""
    if not isinstance(value, list) or any(type(item) is not int or item < 0 for item in value):
        raise ValueError(f"expected a list of natural numbers, got {str(value)[:60]}")
    return tuple(value)


def _entry(name: str, fields: Any) -> Entry:
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"'{name}' needs dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = fields["dtype"], naturals(fields["shape"]), naturals(fields["data_offsets"])
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ValueError(f"'{name}' has unknown dtype {str(dtype)[:20]!r}")
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * ITEM_BYTES[dtype]:
        raise ValueError(f"'{name}': {dtype} {list(shape)} does not fill bytes {list(offsets)}")
    return Entry(dtype, shape, *offsets)


def _check_places(entries: Mapping[str, Entry], available: int) -> None:
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            raise ValueError(f"'{name}' starts at byte {entry.begin}, and the tensor before it ends at {position}")
        position = entry.end
    if position != available:
        raise ValueError(f"tensors take {position} bytes, and the file has {available}")
