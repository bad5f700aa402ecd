"""Who writes which piece, by torch.distributed.checkpoint's planner, with checks and copies that it lacks."""

from __future__ import annotations

import io
import math

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from camshaft.errors import CheckpointError
from camshaft_checkpoint.ranks import Ranks
from camshaft_checkpoint.storage import Reader, Writer


class SavePlanner(DefaultSavePlanner):
    """Replicated tensors are written by one rank each, balanced by size; DTensors piece by piece by their owners."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._copies: dict[MetadataIndex, Tensor] = {}

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """The library keeps one of several equal items without a look at them; compare first.

        Raises:
            CheckpointError: ranks hold different shapes or dtypes under one name, so the tensor is not replicated.
        """
        seen: dict[MetadataIndex, WriteItem] = {}
        for plan in all_plans:
            for item in plan.items:
                other = seen.setdefault(item.index, item)
                if _identity(other) != _identity(item):
                    raise CheckpointError(
                        f"'{item.index.fqn}' is {_identity(other)} on one rank and {_identity(item)} on another;"
                        " a tensor that is divided must be a DTensor to be saved"
                    )
        return super().create_global_plan(all_plans)

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


def plan_bytes(plan: SavePlan) -> int:
    """Bytes of tensor data that a plan writes."""
    return sum(
        math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize
        for item in plan.items
        if item.tensor_data is not None
    )


class Saving:
    """One checkpoint's tensors on their way to disk: ``plan``, optionally ``planner.snapshot``, then ``write``."""

    def __init__(self, tensors: dict[str, Tensor], writer: Writer, ranks: Ranks) -> None:
        self.tensors, self.writer, self.ranks = tensors, writer, ranks
        self.planner = SavePlanner()
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


def read_into(tensors: dict[str, Tensor], reader: Reader, is_main: bool) -> None:
    """Fill ``tensors`` in place with what the checkpoint has under their names, in the layout that they have now.

    The default load plan needs no agreement between ranks: each rank reads the pieces that it misses.
    """
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    metadata = reader.read_metadata()
    planner.set_up_planner(tensors, metadata, is_main)
    reader.set_up_storage_reader(metadata, is_main)
    plan = planner.finish_plan(reader.prepare_local_plan(planner.create_local_plan()))
    with torch.no_grad():
        reader.read_data(plan, planner).wait()
