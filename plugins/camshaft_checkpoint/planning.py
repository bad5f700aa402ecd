"""Who writes and reads which piece, by torch.distributed.checkpoint's planners, with what they lack.

They know plain tensors and DTensors. Rectangles and stretches of flat buffers are added here as boxes, with checks of
what the ranks say together, and with copies.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from camshaft.errors import CheckpointError
from camshaft_checkpoint.copies import Copied, keep_one
from camshaft_checkpoint.held import Divided, Held
from camshaft_checkpoint.ranks import Ranks
from camshaft_checkpoint.storage import Reader, Writer

Divisions = Mapping[str, Divided]
_HOW_DIVIDED = "a tensor that is divided must be a DTensor to be saved, or be in world.parts or world.boxes"


class SavePlanner(DefaultSavePlanner):
    """What several ranks hold alike is written by one of them, balanced by size; the rest by its owners."""

    def __init__(self, divided: Divisions, place: Callable[[int], int]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._divided, self._place = divided, place
        self._live_boxes = _by_index(divided)
        self._copies: dict[MetadataIndex, Tensor] = {}

    def create_local_plan(self) -> SavePlan:
        """The library's items, and one for each box."""
        items = [_write_item(name, tensor, begin) for name, tensor in self._divided.items() for begin in tensor.boxes]
        plan = super().create_local_plan()
        copied = {name: tensor.copied for name, tensor in self._divided.items() if tensor.copied is not None}
        self.plan = dataclasses.replace(plan, items=[*plan.items, *items], planner_data=copied)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        box = self._live_boxes.get(index)
        return super().lookup_object(index) if box is None else box

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """The library keeps one of several equal items without a look at them; compare first.

        Raises:
            CheckpointError: ranks hold different shapes or dtypes under one name, so the tensor is not replicated; or
                what they hold of a tensor is not all of it.
        """
        copied: list[Copied] = [plan.planner_data for plan in all_plans]
        _check_alike(all_plans)
        kept = keep_one(all_plans, copied, self._place)
        seen: dict[MetadataIndex, WriteItem] = {}
        for item in (item for plan in kept for item in plan.items):
            other = seen.setdefault(item.index, item)
            if _identity(other) != _identity(item):
                raise CheckpointError(
                    f"'{item.index.fqn}' is {_identity(other)} on one rank and {_identity(item)} on another;"
                    f" {_HOW_DIVIDED}"
                )
        _check_complete(seen)
        try:
            return super().create_global_plan(kept)
        except ValueError as error:  # complete, and yet not each element once
            raise CheckpointError(f"the ranks hold some elements of a tensor twice: {error}") from error

    def snapshot(self, buffers: dict[MetadataIndex, Tensor]) -> None:
        """Copy what this rank will write to the CPU, so that later steps cannot touch it.

        ``buffers`` are the copies of the save before: memory that is mapped already is several times faster to fill.
        They are replaced by the copies of this one.
        """
        self._copies = {item.index: _copy(self._live(item), buffers.get(item.index)) for item in self.plan.items}
        buffers.clear()
        buffers.update(self._copies)

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        copy = self._copies.get(write_item.index)
        return self._live(write_item) if copy is None else copy

    def _live(self, item: WriteItem) -> Tensor:
        data = super().resolve_data(item)
        assert isinstance(data, Tensor)  # Writer.prepare_local_plan refuses everything else
        return data


def _copy(live: Tensor, buffer: Tensor | None) -> Tensor:
    if buffer is None or (buffer.shape, buffer.dtype) != (live.shape, live.dtype):
        buffer = torch.empty(live.shape, dtype=live.dtype, pin_memory=live.is_cuda)
    return buffer.copy_(live.detach())


def _identity(item: WriteItem) -> str:
    data = item.tensor_data
    if data is None:
        return "no tensor"
    return f"{data.properties.dtype} {list(data.chunk.sizes)} of {list(data.size)}"


def _check_alike(plans: list[SavePlan]) -> None:
    """Boxes of one tensor, wherever they begin, are of one dtype, and of a whole of one shape."""
    seen: dict[str, tuple[int, str]] = {}
    for rank, plan in enumerate(plans):
        for item in plan.items:
            assert item.tensor_data is not None  # Writer.prepare_local_plan saw to it
            kind = f"{item.tensor_data.properties.dtype} {list(item.tensor_data.size)}"
            other, before = seen.setdefault(item.index.fqn, (rank, kind))
            if kind != before:
                raise CheckpointError(
                    f"'{item.index.fqn}' is {before} on rank {other} and {kind} on rank {rank}; {_HOW_DIVIDED}"
                )


def _check_complete(items: Mapping[MetadataIndex, WriteItem]) -> None:
    """Boxes that begin at different places must fill their tensor; that none overlap is checked by the library."""
    counts: dict[str, tuple[int, int]] = {}
    for item in items.values():
        if item.tensor_data is not None:
            found, _ = counts.get(item.index.fqn, (0, 0))
            counts[item.index.fqn] = found + math.prod(item.tensor_data.chunk.sizes), math.prod(item.tensor_data.size)
    for name, (found, wanted) in counts.items():
        if found != wanted:
            raise CheckpointError(f"the ranks hold {found} elements of '{name}', which has {wanted}")


def _by_index(divided: Divisions) -> dict[MetadataIndex, Tensor]:
    return {MetadataIndex(name, begin): box for name, tensor in divided.items() for begin, box in tensor.boxes.items()}


def _chunk(begin: tuple[int, ...], box: Tensor) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(begin), box.shape)


def _write_item(name: str, tensor: Divided, begin: tuple[int, ...]) -> WriteItem:
    box = tensor.boxes[begin]
    data = TensorWriteData(
        chunk=_chunk(begin, box),
        properties=TensorProperties.create_from_tensor(box),
        size=torch.Size(tensor.shape),
    )
    return WriteItem(MetadataIndex(name, begin), WriteItemType.SHARD, tensor_data=data)


def plan_bytes(plan: SavePlan) -> int:
    """Bytes of tensor data that a plan writes."""
    return sum(
        math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize
        for item in plan.items
        if item.tensor_data is not None
    )


class Saving:
    """One checkpoint's tensors on their way to disk: ``plan``, optionally ``planner.snapshot``, then ``write``."""

    def __init__(self, tensors: Mapping[str, Held], writer: Writer, ranks: Ranks, place: Callable[[int], int]) -> None:
        """``place`` tells where on ``tp`` a rank is."""
        self.writer, self.ranks = writer, ranks
        self.tensors, divided = _by_kind(tensors)
        self.planner = SavePlanner(divided, place)
        self.metadata: Metadata | None = None
        self.total = 0
        """Bytes of tensor data of all ranks; known to rank 0 when planned, and to all when it has told them."""
        self.own = SavePlan([])

    def plan(self) -> None:
        """Agree on who writes what. Collective; sets ``metadata`` and ``total`` on rank 0."""
        plans = self.ranks.collect(self.ranks.everywhere(self._local))
        finished = self.ranks.on_main_keep(lambda: self._global(plans or []))
        self.own = self.planner.finish_plan(self.ranks.deal(finished))

    def write(self) -> list[WriteResult]:
        """Write this rank's part; no communication."""
        with torch.no_grad():
            results: list[WriteResult] = self.writer.write_data(self.own, self.planner).value()
        return results

    def _local(self) -> SavePlan:
        self.planner.set_up_planner(self.tensors, self.writer.storage_meta(), self.ranks.is_main)
        self.writer.set_up_storage_writer(self.ranks.is_main)
        return self.writer.prepare_local_plan(self.planner.create_local_plan())

    def _global(self, plans: list[SavePlan]) -> list[SavePlan]:
        merged, self.metadata = self.planner.create_global_plan(plans)
        self.total = sum(plan_bytes(plan) for plan in merged)
        return self.writer.prepare_global_plan(merged)


def _by_kind(tensors: Mapping[str, Held]) -> tuple[dict[str, Tensor], dict[str, Divided]]:
    plain = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    return plain, {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Divided)}


class LoadPlanner(DefaultLoadPlanner):
    """The library's, which also fills boxes."""

    def __init__(self, divided: Divisions) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._divided = divided
        self._live_boxes = _by_index(divided)

    def create_local_plan(self) -> LoadPlan:
        """The library's items, and what boxes here and boxes of the checkpoint have in common."""
        plan = super().create_local_plan()
        items = list(plan.items)
        for name, tensor in self._divided.items():
            chunks = [_chunk(begin, box) for begin, box in tensor.boxes.items()]
            assert self.metadata is not None
            stored = self.metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(name, stored, chunks)
        return dataclasses.replace(plan, items=items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        box = self._live_boxes.get(index)
        return super().lookup_tensor(index) if box is None else box


def read_into(tensors: Mapping[str, Held], reader: Reader, is_main: bool) -> None:
    """Fill ``tensors`` in place with what the checkpoint has under their names, in the layout that they have now.

    The load plan needs no agreement between ranks: each rank reads the pieces that it misses. Values are converted to
    the dtype that the tensors have.
    """
    plain, divided = _by_kind(tensors)
    planner = LoadPlanner(divided)
    metadata = reader.read_metadata()
    planner.set_up_planner(plain, metadata, is_main)
    reader.set_up_storage_reader(metadata, is_main)
    plan = planner.finish_plan(reader.prepare_local_plan(planner.create_local_plan()))
    with torch.no_grad():
        reader.read_data(plan, planner).wait()
