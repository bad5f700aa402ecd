"""Every collective of ours goes through here: it knows plugin, hook, axis, operation, dtype and bytes.

A ``Channel`` is one plugin's line to its peers along one mesh axis. With an observer (the ledger) each call is told to
it before it starts; without one a call costs one comparison more than torch's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


class Call(NamedTuple):
    """One collective that a plugin is about to start on this rank."""

    plugin: str
    hook: str
    axis: str
    op: str
    dtype: torch.dtype
    elements: int
    """Of the whole: the sum over ranks of what ends up where, e.g. all of a gathered tensor."""
    size: int
    """Ranks in the group."""


Observer = Callable[[Call], None]


class Pending:
    """A collective under way."""

    __slots__ = ("_finish", "_work")

    def __init__(self, work: dist.Work | None, finish: Callable[[], None] | None = None) -> None:
        self._work, self._finish = work, finish

    def wait(self) -> None:
        """Return when the result is there (for the device's current stream); may be called again."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        if self._finish is not None:
            finish, self._finish = self._finish, None
            finish()


class Channel:
    """Collectives of ``plugin`` along ``axis``. All of them are asynchronous and return what to wait for.

    Every rank of the group must call the same ones in the same order. ``hook`` says during which hook.
    """

    observer: Observer | None = None
    """Told of every call of every channel; set by the ledger."""

    def __init__(self, group: ProcessGroup, plugin: str, axis: str) -> None:
        self.group, self.plugin, self.axis = group, plugin, axis
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def all_reduce(self, tensor: Tensor, hook: str, op: str = "sum") -> Pending:
        """``tensor`` (contiguous) becomes the ``sum`` or ``max`` over the group, in place."""
        self._tell(hook, "all_reduce", tensor.dtype, tensor.numel())
        kind = dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX
        return Pending(dist.all_reduce(tensor, op=kind, group=self.group, async_op=True))

    def reduce_scatter(self, output: Tensor, source: Tensor, hook: str) -> Pending:
        """``output`` [n] becomes the sum over ranks of their ``source`` [size * n]'s stretch of this rank.

        Ranks are added in ascending order. ``output`` may be this rank's stretch of ``source``; the rest of ``source``
        may be overwritten, and must stay untouched until the wait is over.
        """
        self._tell(hook, "reduce_scatter", source.dtype, source.numel())
        return Pending(dist.reduce_scatter_tensor(output, source, group=self.group, async_op=True))

    def all_gather(self, output: Tensor, source: Tensor, hook: str) -> Pending:
        """``output`` [size * n] becomes the ``source`` [n] of all ranks, in rank order.

        ``source`` may be this rank's stretch of ``output``.
        """
        self._tell(hook, "all_gather", output.dtype, output.numel())
        return Pending(dist.all_gather_into_tensor(output, source, group=self.group, async_op=True))

    def all_to_all(self, outputs: list[Tensor], sources: list[Tensor], hook: str) -> Pending:
        """``outputs[r]`` becomes what rank r has in its ``sources`` for this rank; 1-D, contiguous, any lengths."""
        elements = sum(source.numel() for source in sources)
        self._tell(hook, "all_to_all", sources[0].dtype, elements * self.size)
        received = torch.cat(outputs) if outputs else torch.empty(0)
        work = dist.all_to_all_single(
            received,
            torch.cat(sources),
            [output.numel() for output in outputs],
            [source.numel() for source in sources],
            group=self.group,
            async_op=True,
        )

        def unpack() -> None:
            for output, part in zip(
                outputs, torch.split(received, [output.numel() for output in outputs]), strict=True
            ):
                output.copy_(part)

        return Pending(work, unpack)

    def broadcast(self, tensor: Tensor, source: int, hook: str) -> Pending:
        """``tensor`` becomes that of rank ``source`` of the group."""
        self._tell(hook, "broadcast", tensor.dtype, tensor.numel())
        return Pending(dist.broadcast(tensor, group=self.group, group_src=source, async_op=True))

    def _tell(self, hook: str, op: str, dtype: torch.dtype, elements: int) -> None:
        if Channel.observer is not None:
            Channel.observer(Call(self.plugin, hook, self.axis, op, dtype, elements, self.size))
