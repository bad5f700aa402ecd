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


HYBRID = {"dp": ("dp_replicate", "dp_shard")}
"""An axis that may be divided in two, and the names of its halves. Its own name then means both together."""


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
        data = _data_axes(parallel, _data_degree(parallel, world_size))
        return cls(
            (
                Axis("pp", "pipeline_parallel", parallel.pipeline_parallel),
                *data,
                Axis("cp", "context_parallel", parallel.context_parallel, splits_batch=False),
                Axis("tp", "tensor_parallel", parallel.tensor_parallel),
            )
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that an axis answers to, halves before the axis that they make up."""
        own = [axis.name for axis in self.axes]
        return (*own, *(whole for whole, halves in HYBRID.items() if set(halves) <= set(own)))

    def joined(self, *names: str) -> str:
        """One name for several axes together (``pp+dp+tp``), of those with more than one rank; empty if there is none.

        ``Mesh.channel`` and ``Mesh.group`` take it. Its ranks are in the order of their numbers.
        """
        wanted = {member for name in names for member in self.members(name)}
        return "+".join(axis.name for axis in self.axes if axis.name in wanted and axis.degree > 1)

    def members(self, name: str) -> tuple[str, ...]:
        """The axes of the mesh that ``name`` means: itself, or both halves, the slower-varying first.

        Raises:
            KeyError: no axis is called so.
        """
        if any(axis.name == name for axis in self.axes):
            return (name,)
        if name in self.names:
            return HYBRID[name]
        raise KeyError(f"the mesh has no axis '{name}'; there are: {', '.join(self.names)}")

    def __getitem__(self, name: str) -> Axis:
        """The axis called ``name``; two halves together look like one axis of the product of their degrees."""
        members = self.members(name)
        found = [axis for axis in self.axes if axis.name in members]
        if len(found) == 1:
            return found[0]
        return Axis(name, "data_parallel", math.prod(axis.degree for axis in found), splits_batch=True)

    @property
    def world_size(self) -> int:
        return math.prod(axis.degree for axis in self.axes)

    @property
    def batch_degree(self) -> int:
        """Into how many parts the global batch is split."""
        return math.prod(axis.degree for axis in self.axes if axis.splits_batch)

    def coordinates(self, rank: int) -> Mapping[str, int]:
        """Position of ``rank`` under every name of an axis."""
        found: dict[str, int] = {}
        for axis in reversed(self.axes):
            rank, found[axis.name] = divmod(rank, axis.degree)
        for whole in self.names[len(self.axes) :]:
            slow, fast = HYBRID[whole]
            found[whole] = found[slow] * self[fast].degree + found[fast]
        return found

    def along(self, rank: int, *names: str) -> tuple[int, ...]:
        """Ranks that differ from ``rank`` in their place on axes ``names`` alone, and ``rank`` itself, in order."""
        members, found, stride = {member for name in names for member in self.members(name)}, [rank], 1
        for axis in reversed(self.axes):
            if axis.name in members:
                first = [each - each // stride % axis.degree * stride for each in found]
                found = [each + digit * stride for digit in range(axis.degree) for each in first]
            stride *= axis.degree
        return tuple(sorted(found))

    def batch_index(self, rank: int) -> int:
        """Which part of the global batch ``rank`` reads, from 0 to ``batch_degree`` - 1."""
        place, index = self.coordinates(rank), 0
        for axis in self.axes:
            if axis.splits_batch:
                index = index * axis.degree + place[axis.name]
        return index


def stated_data_parallel(parallel: Parallel) -> int | None:
    """The data-parallel degree, if the recipe says it: itself, or as the product of its halves."""
    if parallel.data_parallel != "auto":
        return parallel.data_parallel
    halves = (parallel.data_parallel_replicate, parallel.data_parallel_shard)
    return halves[0] * halves[1] if halves[0] and halves[1] else None


def _data_degree(parallel: Parallel, world_size: int) -> int:
    fixed = parallel.pipeline_parallel * parallel.context_parallel * parallel.tensor_parallel
    factors = f"pp {parallel.pipeline_parallel} x cp {parallel.context_parallel} x tp {parallel.tensor_parallel}"
    data = stated_data_parallel(parallel)
    if data is None:
        if world_size % fixed:
            raise _refusal(
                f"{world_size} processes cannot be divided by {factors} = {fixed}",
                f"start a multiple of {fixed} processes",
            )
        return world_size // fixed
    if data * fixed != world_size:
        automatic = parallel.data_parallel == "auto"
        raise _refusal(
            f"dp {data} x {factors} = {data * fixed}, but the run has {world_size} process(es)",
            f"start {data * fixed} processes, or "
            + ("remove parallel.data_parallel_replicate" if automatic else "set parallel.data_parallel=auto"),
        )
    return data


def _data_axes(parallel: Parallel, degree: int) -> tuple[Axis, ...]:
    """The data axis, or its two halves where the recipe gives the degree of one."""
    replicate, shard = parallel.data_parallel_replicate, parallel.data_parallel_shard
    if replicate is None and shard is None:
        return (Axis("dp", "data_parallel", degree, splits_batch=True),)
    if replicate and shard and replicate * shard != degree:
        raise _refusal(
            f"replicate {replicate} x shard {shard} = {replicate * shard}, but there are {degree} data-parallel ranks",
            f"remove parallel.data_parallel_replicate: it is derived, as data_parallel / {shard}",
            "parallel.data_parallel_shard",
        )
    given = shard or replicate or 1
    if degree % given:
        name = "data_parallel_shard" if shard else "data_parallel_replicate"
        divisors = ", ".join(str(number) for number in range(1, degree + 1) if degree % number == 0)
        raise _refusal(
            f"{degree} data-parallel rank(s) cannot be divided by {given}",
            f"set it to one of {divisors}, or start a multiple of {given} processes",
            f"parallel.{name}",
        )
    if shard is None:
        shard = degree // given
    halves = zip(HYBRID["dp"], ("data_parallel_replicate", "data_parallel_shard"), strict=True)
    degrees = (degree // shard, shard)
    return tuple(Axis(*half, size, splits_batch=True) for half, size in zip(halves, degrees, strict=True))


def _refusal(message: str, fix: str, key: str = "parallel") -> RecipeError:
    return RecipeError(Problem(message, key=key, fix=fix))


class Mesh:
    """A mesh whose ranks run: the shape, this rank's place in it, and a process group for each axis.

    With one process nothing of torch.distributed is initialised and every group is ``None``.
    """

    def __init__(
        self,
        shape: MeshShape,
        rank: int,
        device_mesh: DeviceMesh | None,
        joined: Mapping[str, ProcessGroup] | None = None,
        timeout: timedelta | None = None,
    ) -> None:
        self.shape, self.rank, self.device_mesh, self._timeout = shape, rank, device_mesh, timeout
        self.place = shape.coordinates(rank)
        self._joined = dict(joined or {})

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
        timeout = timedelta(seconds=timeout_s)
        joined = {name: _join(shape, rank, shape.members(name), timeout) for name in shape.names[len(names) :]}
        mesh = cls(shape, rank, init_device_mesh(device_type, degrees, mesh_dim_names=names), joined, timeout)
        for name in names:  # groups of a part of the ranks do not take over the default group's (gloo: 30 minutes)
            dist.distributed_c10d._set_pg_timeout(timeout, mesh.group(name))
        return mesh

    def degree(self, axis: str) -> int:
        return self.shape[axis].degree

    def channel(self, plugin: str, axis: str) -> Channel | None:
        """The line of ``plugin`` to this rank's peers along ``axis``; ``None`` when there is one process in all."""
        from camshaft.comm import Channel

        group = self.group(axis)
        return None if group is None else Channel(group, plugin, axis, self._timeout)

    def group(self, axis: str) -> ProcessGroup | None:
        """Process group of this rank's peers along ``axis``; ``None`` when there is one process in all.

        For several axes together, ``axis`` is ``shape.joined``'s name of them. The first call makes that group: all
        ranks must call it, in one order.
        """
        if self.device_mesh is None:
            return None
        if "+" in axis and axis not in self._joined:
            self._joined[axis] = _join(self.shape, self.rank, tuple(axis.split("+")), self._timeout)
        return self._joined[axis] if axis in self._joined else self.device_mesh.get_group(axis)


def _join(shape: MeshShape, rank: int, members: tuple[str, ...], timeout: timedelta | None) -> ProcessGroup:
    """The group along axes ``members``; only its own ranks make it, so that many ranks make few groups each.

    ``DeviceMesh`` flattens two of its axes with a private method only.
    """
    import torch.distributed as dist

    own = _others(shape, rank, members)
    ranks = [peer for peer in range(shape.world_size) if _others(shape, peer, members) == own]
    group: ProcessGroup = dist.new_group(ranks, timeout=timeout, use_local_synchronization=True)
    return group


def _others(shape: MeshShape, rank: int, members: tuple[str, ...]) -> list[int]:
    place = shape.coordinates(rank)
    return [place[axis.name] for axis in shape.axes if axis.name not in members]
