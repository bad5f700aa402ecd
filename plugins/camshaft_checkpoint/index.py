"""``index.json``: which tensor lies in which pieces in which files, and all state that is not a tensor. No torch.

``tensors`` maps a name (``model.<parameter>``, ``optimizer.<parameter>.<key>``) to dtype, global shape and pieces;
``document`` holds step and counters, the optimizer's groups and scalars, each plugin's own state and where the
checkpoint comes from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from camshaft.errors import CheckpointError
from camshaft_checkpoint.tensorfile import ITEM_BYTES, Entry, naturals

NAME = "index.json"
MAX_INDEX = 1 << 30


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor: where it starts, its extent, and the file and key that hold it."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    key: str


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor: dtype by the name that safetensors gives it, global shape, and pieces that cover it once."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Index:
    """Contents of ``index.json``."""

    tensors: Mapping[str, Stored]
    document: Mapping[str, Any]

    def encode(self) -> bytes:
        tensors = {
            name: {
                "dtype": stored.dtype,
                "shape": stored.shape,
                "pieces": [
                    {"offsets": piece.offsets, "shape": piece.shape, "file": piece.file, "key": piece.key}
                    for piece in stored.pieces
                ],
            }
            for name, stored in sorted(self.tensors.items())
        }
        return json.dumps({"tensors": tensors, "document": self.document}, separators=(",", ":")).encode()

    def by_file(self) -> dict[str, list[tuple[Stored, Piece]]]:
        """What each file must hold."""
        found: dict[str, list[tuple[Stored, Piece]]] = {}
        for stored in self.tensors.values():
            for piece in stored.pieces:
                found.setdefault(piece.file, []).append((stored, piece))
        return found


def file_faults(path: Path, expected: Iterable[tuple[Stored, Piece]], entries: Mapping[str, Entry]) -> list[str]:
    """Pieces that the index places in the file at ``path`` and that its header does not have, or has otherwise."""
    faults = []
    for stored, piece in expected:
        entry = entries.get(piece.key)
        if entry is None:
            faults.append(f"{path}: has no tensor '{piece.key}', which the index expects")
        elif (entry.dtype, entry.shape) != (stored.dtype, piece.shape):
            faults.append(f"{path}: '{piece.key}' is {entry.dtype} {list(entry.shape)}, not as in the index")
    return faults


def read(path: Path, known: Collection[str]) -> Index:
    """Parse an index whose hash is right already; ``known`` are the files that the manifest vouches for.

    Raises:
        CheckpointError: malformed: a box outside its tensor, tensors that are not covered, an unknown file or dtype.
    """
    try:
        if path.stat().st_size > MAX_INDEX:
            raise ValueError("too long")
        table = json.loads(path.read_bytes())
        tensors = {name: _stored(name, fields, known) for name, fields in table["tensors"].items()}
        if not isinstance(table["document"], dict):
            raise ValueError("'document' is not an object")
        return Index(tensors, table["document"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path}: malformed: {type(error).__name__}: {error}") from error


def _stored(name: str, fields: Mapping[str, Any], known: Collection[str]) -> Stored:
    dtype, shape = fields["dtype"], naturals(fields["shape"])
    if dtype not in ITEM_BYTES:
        raise ValueError(f"'{name}' has unknown dtype {str(dtype)[:20]!r}")
    pieces = tuple(_piece(name, shape, piece, known) for piece in fields["pieces"])
    if sum(math.prod(piece.shape) for piece in pieces) != math.prod(shape):
        raise ValueError(f"the pieces of '{name}' do not cover its shape {list(shape)}")
    return Stored(dtype, shape, pieces)


def _piece(name: str, whole: tuple[int, ...], fields: Mapping[str, Any], known: Collection[str]) -> Piece:
    piece = Piece(naturals(fields["offsets"]), naturals(fields["shape"]), fields["file"], fields["key"])
    inside = len(whole) == len(piece.offsets) == len(piece.shape) and all(
        start + extent <= limit for start, extent, limit in zip(piece.offsets, piece.shape, whole, strict=True)
    )
    if not inside:
        raise ValueError(f"a piece of '{name}' lies outside its shape {list(whole)}")
    if piece.file not in known or not isinstance(piece.key, str):
        raise ValueError(f"a piece of '{name}' names a file that the manifest does not have")
    return piece
