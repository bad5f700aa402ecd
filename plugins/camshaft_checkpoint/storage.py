"""Storage for torch.distributed.checkpoint's planners: one safetensors file a rank, and no pickle.

The planners of the library decide who writes which piece of which tensor, and which pieces a new layout needs; the
classes here put them on disk and get them back. An item that is not a tensor is refused, because the library would
store it as a pickle, and loading a pickle runs whatever it says.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from camshaft.errors import CheckpointError
from camshaft_checkpoint import files, tensorfile
from camshaft_checkpoint.files import Record
from camshaft_checkpoint.index import Index, Piece, Stored
from camshaft_checkpoint.tensorfile import Entry

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16, "I16": torch.int16, "F16": torch.float16,
    "BF16": torch.bfloat16, "U32": torch.uint32, "I32": torch.int32, "F32": torch.float32, "U64": torch.uint64,
    "I64": torch.int64, "F64": torch.float64, "C64": torch.complex64,
}  # fmt: skip
NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(tensor_name: str, dtype: torch.dtype) -> str:
    """The format's name of a dtype. Raises CheckpointError for one that safetensors cannot hold."""
    if dtype not in NAMES:
        raise CheckpointError(f"'{tensor_name}' has dtype {dtype}, which a safetensors file cannot hold")
    return NAMES[dtype]


def key_of(index: MetadataIndex) -> str:
    """Key of a piece in its file: the tensor's name and where the piece starts."""
    return f"{index.fqn}@{','.join(str(start) for start in index.offset or ())}"


@dataclasses.dataclass(frozen=True, slots=True)
class Written:
    """Where one piece went: its key, and the finished file that holds it."""

    key: str
    record: Record


class Writer(StorageWriter):
    """Writes this rank's items into ``<folder>/rank_NNNNN.safetensors``; a rank without items writes no file."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self.folder = self.folder if checkpoint_id is None else Path(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the folder exists before planning starts."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Refuse what is no tensor or has no place in the format, before anything is written."""
        for item in plan.items:
            if item.type is WriteItemType.BYTE_IO or item.tensor_data is None:
                raise CheckpointError(f"'{item.index.fqn}' is not a tensor; a checkpoint holds tensors and JSON only")
            dtype_name(item.index.fqn, item.tensor_data.properties.dtype)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        future: Future[list[WriteResult]] = Future()
        future.set_result(self._write(plan, planner) if plan.items else [])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Nothing to do: committing needs what is not a tensor too, and is done by ``folders.finish``."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return Path(checkpoint_id).is_dir()

    def _write(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        items = {key_of(item.index): item for item in plan.items}
        assert len(items) == len(plan.items), "two pieces have one key"
        entries = tensorfile.layout([(key, *_described(item)) for key, item in items.items()])
        file = files.NewFile(self.folder / f"rank_{self.rank:05d}.safetensors")
        try:
            file.write(tensorfile.encode_header(entries))
            for key, entry in entries.items():
                data = planner.resolve_data(items[key])
                assert isinstance(data, Tensor)  # prepare_local_plan refused everything else
                file.write(_raw(key, data, entry))
            record = file.close()
        finally:
            file.abandon()
        return [
            WriteResult(item.index, entries[key].end - entries[key].begin, Written(key, record))
            for key, item in items.items()
        ]


def _described(item: WriteItem) -> tuple[str, tuple[int, ...]]:
    assert item.tensor_data is not None  # prepare_local_plan saw to it
    dtype = dtype_name(item.index.fqn, item.tensor_data.properties.dtype)
    return dtype, tuple(item.tensor_data.chunk.sizes)


def _raw(key: str, data: Tensor, entry: Entry) -> memoryview:
    """The bytes of a tensor in row-major order, without a copy when it lies on the CPU in that order already."""
    if (NAMES[data.dtype], tuple(data.shape)) != (entry.dtype, entry.shape):
        raise CheckpointError(f"'{key}' became {data.dtype} {list(data.shape)} after it was planned")
    if not data.numel():
        return memoryview(b"")
    flat = data.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    raw: memoryview = flat.view(torch.uint8).numpy().data
    return raw


class Reader(StorageReader):
    """Reads pieces of tensors from a checkpoint that was verified, as the load planner asks for them."""

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder, self.index = folder, index

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self.folder = self.folder if checkpoint_id is None else Path(checkpoint_id)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index in the planner's terms."""
        return Metadata(
            {name: _metadata(stored) for name, stored in self.index.tensors.items()},
            storage_data={
                MetadataIndex(name, piece.offsets): piece
                for name, stored in self.index.tensors.items()
                for piece in stored.pieces
            },
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._pieces: Mapping[MetadataIndex, Piece] = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            if item.type is not LoadItemType.TENSOR:
                raise CheckpointError(f"'{item.dest_index.fqn}' is not a tensor")
            by_file.setdefault(self._pieces[item.storage_index].file, []).append(item)
        for name, items in sorted(by_file.items()):
            with safe_open(self.folder / name, framework="pt") as opened:
                for item in items:
                    self._read(opened, item, planner)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return Path(checkpoint_id).is_dir()

    def _read(self, opened: Any, item: ReadItem, planner: LoadPlanner) -> None:
        if 0 in item.lengths:
            return
        box = tuple(
            slice(start, start + extent) for start, extent in zip(item.storage_offsets, item.lengths, strict=True)
        )
        key = self._pieces[item.storage_index].key
        data = opened.get_slice(key)[box] if box else opened.get_tensor(key)
        target = planner.resolve_tensor(item).detach()
        target.copy_(data)
        planner.commit_tensor(item, target)


def _metadata(stored: Stored) -> TensorStorageMetadata:
    chunks = [ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.shape)) for piece in stored.pieces]
    return TensorStorageMetadata(TensorProperties(DTYPES[stored.dtype]), torch.Size(stored.shape), chunks)


def index_of(metadata: Metadata, results: Iterable[WriteResult], document: Mapping[str, Any]) -> Index:
    """Join what was planned with where each piece went."""
    places = {result.index: result.storage_data for result in results}
    tensors = {}
    for name, stored in metadata.state_dict_metadata.items():
        assert isinstance(stored, TensorStorageMetadata)
        pieces = []
        for chunk in stored.chunks:
            written: Written = places[MetadataIndex(name, chunk.offsets)]
            pieces.append(Piece(tuple(chunk.offsets), tuple(chunk.sizes), written.record.name, written.key))
        tensors[name] = Stored(NAMES[stored.properties.dtype], tuple(stored.size), tuple(pieces))
    return Index(tensors, document)


def records_of(results: Iterable[WriteResult]) -> tuple[Record, ...]:
    """Every file that was written, once."""
    found = {result.storage_data.record.name: result.storage_data.record for result in results}
    return tuple(found[name] for name in sorted(found))
