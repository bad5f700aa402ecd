"""Every collective of ours goes through here: it knows plugin, hook, axis, operation, dtype and bytes.

A ``Channel`` is one plugin's line to its peers along one mesh axis. With an observer (the ledger) each call is told to
it before it starts; without one a call costs one comparison more than what it is made of.

On CUDA the collectives are torch's own. On a CPU, where gloo carries them, those that gloo does worse are composed of
point-to-point messages (``camshaft.comm_exchange`` says which, and by how much).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from camshaft.comm_exchange import Scratch, add_in_order, exchange, message

_SHARE: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda size: 2 * (size - 1) / size,
    "all_to_all": lambda size: (size - 1) / size**2,
    "gather": lambda size: (size - 1) / size**2,
    "scatter": lambda size: (size - 1) / size**2,
    "send": lambda size: 1.0,
    "recv": lambda size: 0.0,
    "barrier": lambda size: 0.0,
}


def sent(op: str, size: int, elements: int) -> float:
    """Elements that one of ``size`` ranks sends for ``op``, by the best algorithm: ring, or pairwise.

    ``elements``: of the whole, that is all of what is reduced, gathered, scattered or broadcast, and for an all-to-all
    what all ranks hold together. All-reduce: 2 (N-1)/N of it (Patarasuk and Yuan, J. Parallel Distrib. Comput. 69,
    2009); all-to-all: (N-1)/N of a rank's own part; a message: all of it; others: (N-1)/N. Of operations that not all
    ranks take an equal part in it is the mean over ranks.
    """
    share = _SHARE.get(op)
    return elements * ((size - 1) / size if share is None else share(size))


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
    away: int | None = None
    """Elements that this rank sends, where only it knows (all_to_all); None: as ``sent`` says."""

    @property
    def bytes(self) -> float:
        """Bytes that this rank sends, by theory."""
        count = sent(self.op, self.size, self.elements) if self.away is None else self.away
        return count * self.dtype.itemsize


class Message(NamedTuple):
    """``tensor``, to rank ``peer`` of the group where it goes ``away``, and else from it; contiguous."""

    tensor: Tensor
    peer: int
    away: bool

    @property
    def op(self) -> str:
        """Name of the operation, as ``sent`` takes it."""
        return "send" if self.away else "recv"


Observer = Callable[[Call], None]

FEW = 4096
"""Elements up to which two ranks swap what they reduce: that takes half the time of gloo's rounds, or less."""

_thread = threading.local()


def starting() -> bool:
    """Whether this thread is inside of a channel's call, which an observer has been told of."""
    return getattr(_thread, "starting", False)


class Pending:
    """A collective under way. It must be waited for, also when its result is of no use any more."""

    __slots__ = ("_finish", "_timeout", "_works")

    def __init__(
        self, works: Sequence[Work], finish: Callable[[], None] | None = None, timeout: timedelta | None = None
    ) -> None:
        self._works, self._finish, self._timeout = works, finish, timeout

    def wait(self) -> None:
        """Return when the result is there (for the device's current stream); may be called again.

        Raises:
            RuntimeError: a peer is gone, or did not come within the group's time-out.
        """
        for work in self._works:
            if self._timeout is None:  # nccl would wait on the host if it got one
                work.wait()
            else:
                work.wait(self._timeout)
        self._works = ()
        if self._finish is not None:
            finish, self._finish = self._finish, None
            finish()


_DONE = Pending(())

# torch 2.13 renames the flat collectives, and warns of the old names, which are all that 2.11 has.
_gather: Callable[..., Work] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter: Callable[..., Work] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Channel:
    """Collectives of ``plugin`` along ``axis``. All of them are asynchronous and return what to wait for.

    Every rank of the group must call the same ones in the same order; they may be waited for in any order. Tensors are
    contiguous and must stay untouched until the wait is over. ``hook`` says during which hook. Alone in its group, a
    rank copies and sends nothing.
    """

    observer: Observer | None = None
    """Told of every call of every channel; set by the ledger."""

    def __init__(self, group: ProcessGroup, plugin: str, axis: str, timeout: timedelta | None = None) -> None:
        """``timeout``: of a message; that of the group when it was made if None, whatever the group got later."""
        self.group, self.plugin, self.axis, self._timeout = group, plugin, axis, timeout
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self._scratch = Scratch()
        self._back = group
        """Carries messages, and what composed collectives send, to lower ranks."""

    def split_directions(self) -> None:
        """On a CPU, give what travels to lower ranks connections of their own; all ranks of the group call it at once.

        While one thread writes to a connection of gloo's, the thread that reads from it spins, on a core that somebody
        needs, and what has come waits. The price is three more threads a group, which sleep.
        """
        if self.size > 1 and self._back is self.group and _device(self.group).type == "cpu":
            ranks = dist.get_process_group_ranks(self.group)
            self._back = dist.new_group(ranks, timeout=self._timeout, use_local_synchronization=True)

    def all_reduce(self, tensor: Tensor, hook: str, op: str = "sum") -> Pending:
        """``tensor`` becomes the ``sum`` or ``max`` over the group, in place."""
        if Channel.observer is None:
            return self._all_reduce(tensor, op)
        with self._told(hook, "all_reduce", tensor.dtype, tensor.numel()):
            return self._all_reduce(tensor, op)

    def reduce_scatter(self, output: Tensor, source: Tensor, hook: str) -> Pending:
        """``output`` [n] becomes the sum over ranks of their ``source`` [size * n]'s stretch of this rank.

        ``output`` may be this rank's stretch of ``source``; the rest of ``source`` may be overwritten. On a CPU ranks
        are added in ascending order, in the tensors' dtype, or in fp32 and rounded once where that is narrower. It
        takes (size - 2) n elements of memory beside them there, in place (size - 1) n, which the channel keeps for its
        next calls.
        """
        if Channel.observer is None:
            return self._reduce_scatter(output, source)
        with self._told(hook, "reduce_scatter", source.dtype, source.numel()):
            return self._reduce_scatter(output, source)

    def all_gather(self, output: Tensor, source: Tensor, hook: str) -> Pending:
        """``output`` [size * n] becomes the ``source`` [n] of all ranks, in rank order.

        ``source`` may be this rank's stretch of ``output``.
        """
        if Channel.observer is None:
            return self._all_gather(output, source)
        with self._told(hook, "all_gather", output.dtype, output.numel()):
            return self._all_gather(output, source)

    def all_to_all(self, outputs: Sequence[Tensor], sources: Sequence[Tensor], hook: str) -> Pending:
        """``outputs[r]`` becomes what rank r has in its ``sources`` for this rank; one dtype, any lengths, also none.

        An empty list is one of empty tensors.
        """
        if Channel.observer is None:
            return self._all_to_all(outputs, sources)
        kept = sources[self.rank].numel() if sources else 0
        elements = sum(source.numel() for source in sources)
        dtype = next((tensor.dtype for tensor in (*sources, *outputs)), torch.uint8)
        with self._told(hook, "all_to_all", dtype, elements * self.size, elements - kept):
            return self._all_to_all(outputs, sources)

    def broadcast(self, tensor: Tensor, source: int, hook: str) -> Pending:
        """``tensor`` becomes that of rank ``source`` of the group."""
        if Channel.observer is None:
            return self._broadcast(tensor, source)
        with self._told(hook, "broadcast", tensor.dtype, tensor.numel()):
            return self._broadcast(tensor, source)

    def send(self, tensor: Tensor, peer: int, hook: str) -> Pending:
        """Message ``tensor`` to rank ``peer`` of the group, for the same number of its receives from this rank."""
        if Channel.observer is None and tensor.is_cpu:
            return self._message(tensor, peer, True)
        return self.messages((Message(tensor, peer, True),), hook)[0]

    def recv(self, tensor: Tensor, peer: int, hook: str) -> Pending:
        """``tensor`` becomes the message of rank ``peer`` that is the next one for this rank."""
        if Channel.observer is None and tensor.is_cpu:
            return self._message(tensor, peer, False)
        return self.messages((Message(tensor, peer, False),), hook)[0]

    def messages(self, several: Sequence[Message], hook: str) -> list[Pending]:
        """Start ``several`` messages, with what to wait for of each. Ranks that take no part need not call.

        On a device they are started together: neither waits for another of them. On a CPU the length goes along:
        messages of unequal lengths never meet, and both ranks fail at their time-out.
        """
        if Channel.observer is None:
            return self._messages(several)
        started: list[Pending] = []
        for each in several if several[0].tensor.is_cpu else ():
            with self._told(hook, each.op, each.tensor.dtype, each.tensor.numel()):
                started += self._messages((each,))
        if not started:
            for each in several[1:]:
                Channel.observer(self._call(hook, each.op, each.tensor.dtype, each.tensor.numel()))
            with self._told(hook, several[0].op, several[0].tensor.dtype, several[0].tensor.numel()):
                started = self._messages(several)
        return started

    def _messages(self, several: Sequence[Message]) -> list[Pending]:
        if several[0].tensor.is_cpu:
            return [self._message(*each) for each in several]
        calls = [
            dist.P2POp(dist.isend if each.away else dist.irecv, each.tensor, group=self.group, group_peer=each.peer)
            for each in several
        ]
        together = Pending(dist.batch_isend_irecv(calls))
        return [together] * len(several)

    def _message(self, tensor: Tensor, peer: int, away: bool) -> Pending:
        group = self.group if (peer > self.rank) is away else self._back
        return Pending((message(group, tensor, peer, away),), None, self._timeout)

    def trim(self) -> None:
        """Let go of the memory that is kept for next calls."""
        self._scratch.clear()

    def _all_reduce(self, tensor: Tensor, op: str) -> Pending:
        if self.size == 1:
            return _DONE
        if self.size == 2 and tensor.is_cpu and 0 < tensor.numel() <= FEW:
            return self._reduce_of_two(tensor, op)
        # gloo's own: composed of messages it sends the same and is no faster, and it would have to add during the wait.
        kind = dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX
        return Pending((dist.all_reduce(tensor, op=kind, group=self.group, async_op=True),))

    def _reduce_of_two(self, tensor: Tensor, op: str) -> Pending:
        flat = tensor.detach().view(-1)
        other = torch.empty_like(flat)
        works = exchange(self.group, self._back, self.rank, (other, other), (flat, flat))
        join = torch.add if op == "sum" else torch.maximum

        def finish() -> None:
            join(flat, other, out=flat)

        return Pending(works, finish, self._timeout)

    def _reduce_scatter(self, output: Tensor, source: Tensor) -> Pending:
        if self.size == 1:
            return _copied(output, source)
        if not source.is_cpu:
            return Pending((_scatter(output, source, group=self.group, async_op=True),))
        count = output.numel()
        if not count:
            return _DONE
        own, stretches, flat = self.rank, source.detach().view(self.size, count).unbind(), output.detach().view(-1)
        received: tuple[Tensor, ...] = () if output.data_ptr() == stretches[own].data_ptr() else (flat,)
        beside = self.size - 1 - len(received)
        buffer = self._scratch.take(beside * count * source.itemsize) if beside else None
        if buffer is not None:
            received += buffer.view(source.dtype).view(beside, count).unbind()
        works = exchange(self.group, self._back, own, (*received[:own], flat, *received[own:]), stretches)
        parts = (*received[:own], stretches[own], *received[own:])

        def add() -> None:
            add_in_order(flat, parts)
            if buffer is not None:
                self._scratch.give(buffer)

        return Pending(works, add, self._timeout)

    def _all_gather(self, output: Tensor, source: Tensor) -> Pending:
        if self.size == 1:
            return _copied(output, source)
        if not output.is_cpu:
            return Pending((_gather(output, source, group=self.group, async_op=True),))
        count = source.numel()
        if not count:
            return _DONE
        stretches = output.detach().view(self.size, count).unbind()
        flat = source.detach().view(-1)
        works = exchange(self.group, self._back, self.rank, stretches, (flat,) * self.size)
        _copied(stretches[self.rank], flat)  # while the messages travel
        return Pending(works, None, self._timeout)

    def _all_to_all(self, outputs: Sequence[Tensor], sources: Sequence[Tensor]) -> Pending:
        sample = next(iter((*outputs, *sources)), None)
        if sample is None:
            sample = torch.empty(0, device=_device(self.group))  # nothing here, but nccl's call is one of all ranks
        nothing = [sample.new_empty(0)] * self.size
        outputs, sources = outputs or nothing, sources or nothing
        if self.size > 1 and not sample.is_cpu:
            return Pending((dist.all_to_all(list(outputs), list(sources), group=self.group, async_op=True),))
        works = exchange(self.group, self._back, self.rank, outputs, sources)
        _copied(outputs[self.rank], sources[self.rank])
        return Pending(works, None, self._timeout)

    def _broadcast(self, tensor: Tensor, source: int) -> Pending:
        if self.size == 1:
            return _DONE
        return Pending((dist.broadcast(tensor, group=self.group, group_src=source, async_op=True),))

    def _call(self, hook: str, op: str, dtype: torch.dtype, elements: int, away: int | None = None) -> Call:
        return Call(self.plugin, hook, self.axis, op, dtype, elements, self.size, away)

    @contextmanager
    def _told(self, hook: str, op: str, dtype: torch.dtype, elements: int, away: int | None = None) -> Iterator[None]:
        """Tell the observer, which then knows of what torch is asked for inside."""
        assert Channel.observer is not None
        Channel.observer(self._call(hook, op, dtype, elements, away))
        _thread.starting = True
        try:
            yield
        finally:
            _thread.starting = False


def _copied(output: Tensor, source: Tensor) -> Pending:
    if output.data_ptr() != source.data_ptr():
        output.detach().view(-1).copy_(source.detach().view(-1))
    return _DONE


def _device(group: ProcessGroup) -> torch.device:
    """Where tensors of ``group`` are when no tensor tells."""
    # Not equal: groups of a run have a backend for each kind of device, and torch then tells "cpu:gloo,cuda:nccl".
    return torch.device("cuda" if "nccl" in dist.get_backend(group) else "cpu")
