"""What makes a folder a checkpoint: a manifest with size and hash of every file, and what is wrong with a damaged one.

``manifest.json`` is written last and holds its own digest; its bytes must equal what writing the parsed contents
again gives, so that every single changed bit is found. This finds damage, it does not prove who wrote a file. No torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from camshaft.errors import CheckpointError
from camshaft_checkpoint import files, index, tensorfile
from camshaft_checkpoint.files import Record

FORMAT = 1
"""Version of the layout of a checkpoint folder."""
NAME = "manifest.json"
MAX_MANIFEST = 64 << 20
STEP_FOLDER = re.compile(r"step_(\d{8,18})")
_NAMED = 2
Pieces = list[tuple[index.Stored, index.Piece]]
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True)
class Manifest:
    """Step and number of ranks that wrote the checkpoint, and every other file of it."""

    step: int
    world_size: int
    files: tuple[Record, ...]

    def encode(self) -> bytes:
        """The one form that a manifest has on disk."""
        body: dict[str, Any] = {
            "format": FORMAT,
            "step": self.step,
            "world_size": self.world_size,
            "files": {item.name: {"size": item.size, "sha256": item.sha256} for item in self.files},
        }
        digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
        return json.dumps({**body, "digest": digest}, indent=1).encode() + b"\n"

    @property
    def size(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(record.size for record in self.files)


def folder_name(step: int) -> str:
    """Name of the folder of the checkpoint of ``step``."""
    return f"step_{step:08d}"


def folder_step(folder: Path) -> int | None:
    """Step that a folder's name says, or None when it is not named like a checkpoint."""
    found = STEP_FOLDER.fullmatch(folder.name)
    return int(found[1]) if found else None


def read(folder: Path) -> Manifest:
    """Read and check the manifest of one checkpoint.

    Raises:
        CheckpointError: it is missing, altered, of another format, or belongs to another step than the folder.
    """
    path = folder / NAME
    try:
        if path.stat().st_size > MAX_MANIFEST:
            raise CheckpointError(f"{path}: longer than {files.readable(MAX_MANIFEST)}")
        text = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; the checkpoint was never completed, or the file was lost") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    manifest = _parse(path, text)
    named = folder_step(folder)
    if named is not None and named != manifest.step:
        raise CheckpointError(f"{path}: written for step {manifest.step}, found in {folder.name}")
    return manifest


def _parse(path: Path, text: bytes) -> Manifest:
    try:
        table = json.loads(text)
        version = table["format"]
        if version != FORMAT:
            raise CheckpointError(f"{path}: format {str(version)[:20]}, and this Camshaft reads format {FORMAT}")
        if any(type(table[key]) is not int or table[key] < 0 for key in ("step", "world_size")):
            raise ValueError("step and world_size must be natural numbers")
        records = tuple(_record(name, fields) for name, fields in table["files"].items())
        manifest = Manifest(table["step"], table["world_size"], records)
        intact = manifest.encode() == text
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: altered or truncated: {type(error).__name__}: {error}") from error
    if not intact:
        raise CheckpointError(f"{path}: altered: its contents do not match its digest")
    return manifest


def _record(name: str, fields: dict[str, Any]) -> Record:
    size, digest = fields["size"], fields["sha256"]
    if not _FILE_NAME.fullmatch(name) or name == NAME:
        raise ValueError(f"{name[:40]!r} is not a file name of a checkpoint")
    if type(size) is not int or size < 0 or not isinstance(digest, str):
        raise ValueError(f"size and sha256 of {name!r} are malformed")
    return Record(name, size, digest)


def glance(folder: Path) -> list[str]:
    """Faults that show without reading contents: the manifest, and every file's presence and size."""
    try:
        manifest = read(folder)
    except CheckpointError as error:
        return [str(error)]
    return [fault for record in manifest.files for fault in size_faults(folder, record)]


def size_faults(folder: Path, record: Record) -> list[str]:
    """What is wrong with one file's presence and size."""
    path = folder / record.name
    try:
        size = path.lstat().st_size
    except OSError:
        return [f"{path}: missing"]
    if path.is_symlink() or not path.is_file():
        return [f"{path}: not a regular file"]
    return [] if size == record.size else [f"{path}: has {size} bytes, and {record.size} were written"]


def check_files(folder: Path, records: Sequence[Record], table: index.Index | None) -> list[str]:
    """Read ``records`` in full: size, hash, header, and the tensors that the index expects in each."""
    expected = {} if table is None else table.by_file()
    faults: list[str] = []
    for record in records:
        found = size_faults(folder, record) or _faults_of(
            folder / record.name, partial(_contents, folder, record, expected)
        )
        faults += [found[0] + _holding(expected.get(record.name, [])), *found[1:]] if found else []
    return faults


def _holding(lost: Pieces) -> str:
    """What goes missing with a file: a rank's share, which may be that of a pipeline stage that no other has."""
    names = list(dict.fromkeys(piece.key.rpartition("@")[0] for _, piece in lost))
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f" (it holds {', '.join(names[:_NAMED])}{more})" if names else ""


def _contents(folder: Path, record: Record, expected: Mapping[str, Pieces]) -> list[str]:
    path = folder / record.name
    found = files.sha256(path)
    if found != record.sha256:
        return [f"{path}: contents changed: SHA-256 is {found[:16]}..., and {record.sha256[:16]}... was written"]
    if record.name not in expected:
        return []
    return index.file_faults(path, expected[record.name], tensorfile.read_header(path))


def _faults_of(path: Path, check: Callable[[], list[str]]) -> list[str]:
    try:
        return check()
    except CheckpointError as error:
        return [str(error)]
    except OSError as error:
        return [f"{path}: cannot be read: {error.strerror or error}"]


def read_index(folder: Path, manifest: Manifest) -> index.Index:
    """Verify and parse the index of a checkpoint.

    Raises:
        CheckpointError: it is not in the manifest, altered, or malformed.
    """
    record = next((record for record in manifest.files if record.name == index.NAME), None)
    if record is None:
        raise CheckpointError(f"{folder / NAME}: names no {index.NAME}")
    faults = check_files(folder, [record], None)
    if faults:
        raise CheckpointError(faults[0])
    return index.read(folder / index.NAME, {record.name for record in manifest.files})


def verify(folder: Path) -> list[str]:
    """Every fault of one checkpoint folder, each with the path of its file; empty when it can be loaded."""
    try:
        manifest = read(folder)
        table: index.Index | None = None
        faults: list[str] = []
        try:
            table = read_index(folder, manifest)
        except CheckpointError as error:
            faults = [str(error)]
        others = [record for record in manifest.files if record.name != index.NAME]
        return faults + check_files(folder, others, table)
    except CheckpointError as error:
        return [str(error)]
