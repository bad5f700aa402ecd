"""The device mesh: named axes and their degrees. It knows how many ranks an axis has, not what it is for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from camshaft.errors import Problem, RecipeError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from camshaft.comm import Channel
    from camshaft.recipe.schema import Parallel


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of the mesh. ``key`` is its name in the recipe; with ``splits_batch`` its ranks see other samples."""

    name: str
    key: str
    degree: int
    splits_batch: bool = False


@dataclass(frozen=True, slots=True)
class MeshShape:
    """Axes from the slowest-varying rank digit to the fastest. Pure arithmetic, made without torch."""

    axes: tuple[Axis, ...]

    @classmethod
    def of(cls, parallel: Parallel, world_size: int) -> MeshShape:
        """Resolve ``data_parallel: auto`` and check the product of the degrees against ``world_size``.

        Raises:
            RecipeError: the degrees do not multiply to the number of processes.
        """
        fixed = parallel.pipeline_parallel * parallel.context_parallel * parallel.tensor_parallel
        factors = f"pp {parallel.pipeline_parallel} x cp {parallel.context_parallel} x tp {parallel.tensor_parallel}"
        data = parallel.data_parallel
        if data == "auto":
            if world_size % fixed:
                raise RecipeError(
                    Problem(
                        f"{world_size} processes cannot be divided by {factors} = {fixed}",
                        key="parallel",
                        fix=f"start a multiple of {fixed} processes",
                    )
                )
            data = world_size // fixed
        if data * fixed != world_size:
            raise RecipeError(
                Problem(
                    f"dp {data} x {factors} = {data * fixed}, but the run has {world_size} process(es)",
                    key="parallel",
                    fix=f"start {data * fixed} processes, or set parallel.data_parallel=auto",
                )
            )
        return cls(
            (
                Axis("pp", "pipeline_parallel", parallel.pipeline_parallel),
                Axis("dp", "data_parallel", data, splits_batch=True),
                Axis("cp", "context_parallel", parallel.context_parallel, splits_batch=False),
                Axis("tp", "tensor_parallel", parallel.tensor_parallel),
            )
        )

    def __getitem__(self, name: str) -> Axis:
        return next(axis for axis in self.axes if axis.name == name)

    @property
    def world_size(self) -> int:
        return math.prod(axis.degree for axis in self.axes)

    @property
    def batch_degree(self) -> int:
        """Into how many parts the global batch is split."""
        return math.prod(axis.degree for axis in self.axes if axis.splits_batch)

    def coordinates(self, rank: int) -> Mapping[str, int]:
        """Position of ``rank`` on every axis."""
        found: dict[str, int] = {}
        for axis in reversed(self.axes):
            rank, found[axis.name] = divmod(rank, axis.degree)
        return found

    def batch_index(self, rank: int) -> int:
        """Which part of the global batch ``rank`` reads, from 0 to ``batch_degree`` - 1."""
        place, index = self.coordinates(rank), 0
        for axis in self.axes:
            if axis.splits_batch:
                index = index * axis.degree + place[axis.name]
        return index


class Mesh:
    """A mesh whose ranks run: the shape, this rank's place in it, and a process group for each axis.

    With one process nothing of torch.distributed is initialised and every group is ``None``.
    """

    def __init__(self, shape: MeshShape, rank: int, device_mesh: DeviceMesh | None) -> None:
        self.shape, self.rank, self.device_mesh = shape, rank, device_mesh
        self.place = shape.coordinates(rank)

    @classmethod
    def connect(cls, shape: MeshShape, rank: int, device_type: str, timeout_s: int) -> Mesh:
        """Build the process groups. The default group must exist if there is more than one process.

        A collective of any of them waits ``timeout_s`` seconds for a peer, at most.
        """
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh

        if not dist.is_initialized():
            return cls(shape, rank, None)
        degrees = tuple(axis.degree for axis in shape.axes)
        names = tuple(axis.name for axis in shape.axes)
        mesh = cls(shape, rank, init_device_mesh(device_type, degrees, mesh_dim_names=names))
        for name in names:  # groups of a part of the ranks do not take over the default group's (gloo: 30 minutes)
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), mesh.group(name))
        return mesh

    def degree(self, axis: str) -> int:
        return self.shape[axis].degree

    def channel(self, plugin: str, axis: str) -> Channel | None:
        """The line of ``plugin`` to this rank's peers along ``axis``; ``None`` when there is one process in all."""
        from camshaft.comm import Channel

        group = self.group(axis)
        return None if group is None else Channel(group, plugin, axis)

    def group(self, axis: str) -> ProcessGroup | None:
        """Process group of this rank's peers along ``axis``; ``None`` when there is one process in all."""
        return None if self.device_mesh is None else self.device_mesh.get_group(axis)
