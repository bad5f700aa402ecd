"""The ledger of one rank: told of every collective, it counts it, notes it and looks what the peers called."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from camshaft import ending
from camshaft.comm import Call, Channel, sent
from camshaft.distributed import side_store
from camshaft.errors import RanksDiverged
from camshaft_ledger.board import Board
from camshaft_ledger.book import Book, Key
from camshaft_ledger.library import Started, Tap, in_background
from camshaft_ledger.sequence import Entry
from camshaft_ledger.sequence import Sequence as Calls
from camshaft_ledger.watcher import Watcher

if TYPE_CHECKING:
    from camshaft.comm import Pending
    from camshaft.mesh import Mesh, MeshShape
    from camshaft.state import World

ANSWER_S = 5.0
"""How long the others may take to say what they called."""

_runs = itertools.count()
_LOST = re.compile(r"gloo|nccl|connection|timed out|peer", re.IGNORECASE)
_MESSAGES = ("send", "recv")  # between two ranks: the others' count on the axis is another one


class Ledger:
    """Collective to construct, over all ranks. ``close`` must be called, at the same point by all that go on."""

    def __init__(self, world: World, plugin: str, *, compare_every: int, stall_s: float, library: bool) -> None:
        self.book = Book()
        self._rank, self._plugin, self._every = world.rank, plugin, compare_every
        groups = groups_of(world.mesh.shape, world.rank)
        self._axes = tuple(groups)
        self._sequence = Calls(groups, compare_every + 3)
        store = side_store(f"ledger/{next(_runs)}")
        self._board = Board.open(store, world.rank, groups)
        self._watcher = Watcher(self._sequence, store, world.rank, stall_s, self._board.level)
        self._names = _names(world.mesh, groups)
        timeout = timedelta(seconds=world.recipe.launch.group_timeout_s)
        group = dist.new_group(backend="gloo", timeout=timeout)
        self._line = Channel(group, plugin, "world", timeout)
        self._comparison: tuple[Pending, torch.Tensor] | None = None
        self._tap = Tap(self._library) if library else None
        self._entries: dict[Call, Entry] = {}
        self._step = 0

    def open(self) -> None:
        """Be told of every call from now on."""
        Channel.observer = self._channel
        if self._tap is not None:
            self._tap.open()
        self._watcher.start()

    def begin(self, step: int) -> None:
        """The first step is the one after ``step``."""
        self._step = step
        self._sequence.begin(step + 1)
        self.book.begin()

    def end_step(self, step: int) -> None:
        """A step is over on this rank: every so often its hashes are compared, by the time the next one is over.

        Raises:
            RanksDiverged: ranks made different calls.
        """
        self._sequence.end_step()
        self._step = step
        self._board.step(step)
        if step % self._every == 0:
            self._finish_comparison()
            self._start_comparison()

    def close(self, status: str, error: BaseException | None) -> None:
        """Compare what is left to compare, and let go of everything.

        Raises:
            RanksDiverged: ranks made different calls.
        """
        try:
            if status == "failed":
                self._explain_failure(error)
            else:
                self._sequence.end()
                self._board.step(self._step + 1)
                self._finish_comparison()
                self._start_comparison()
                self._finish_comparison()
        finally:
            self._watcher.stop()
            Channel.observer = None
            if self._tap is not None:
                self._tap.close()

    def _explain_failure(self, error: BaseException | None) -> None:
        """A connection that was lost may be a consequence: of a rank that saw the ranks differ, or that broke by it."""
        self._sequence.end("failed")
        root = _root(error)
        if not isinstance(root, RuntimeError) or not _LOST.search(str(root)):
            self._watcher.publish()
            return
        text = self._watcher.explain(2.0)
        if text is not None:
            self._watcher.wait_for_others()
            ending.end(RanksDiverged(text))

    def _channel(self, call: Call) -> None:
        self.book.add(Key(call.plugin, call.axis, call.op), call.bytes)
        if call.plugin == self._plugin or call.axis not in self._axes or call.op in _MESSAGES or in_background():
            return
        entry = self._entries.get(call)
        if entry is None:
            elements = 0 if call.op == "all_to_all" else call.elements
            entry = Entry(call.plugin, call.hook, call.axis, call.op, _name(call.dtype), elements)
            self._entries[call] = entry
        self._note(entry)

    def _library(self, call: Started) -> None:
        axis = self._axis(call.group)
        count = sent(call.op, call.group.size(), call.elements) if call.away is None else call.away
        self.book.add(Key(call.plugin, axis, call.op), count * call.dtype.itemsize)
        if axis in self._axes and call.op not in _MESSAGES and not in_background():
            elements = 0 if call.op == "all_to_all" else call.elements
            self._note(Entry(call.plugin, call.hook, axis, call.op, _name(call.dtype), elements))

    def _axis(self, group: dist.ProcessGroup) -> str:
        """The axis of the mesh whose ranks ``group`` has; else ``other``."""
        name = group.group_name
        if name not in self._names:
            ranks = tuple(sorted(dist.get_process_group_ranks(group)))
            self._names[name] = next((axis for axis, own in self._sequence.groups.items() if own == ranks), "other")
        return self._names[name]

    def _note(self, entry: Entry) -> None:
        self._look(entry.axis, *self._sequence.add(entry))

    def _look(self, axis: str, number: int, mark: int) -> None:
        peer = self._board.differs(axis, number, mark)
        if peer is not None:
            raise self._diverged(f"rank {self._rank} and rank {peer} differ in call {number} on {axis}")

    def _start_comparison(self) -> None:
        own = torch.tensor([self._sequence.hashes[axis] for axis in self._axes], dtype=torch.int64)
        found = torch.empty(own.numel() * self._line.size, dtype=torch.int64)
        self._comparison = self._line.all_gather(found, own, "post_step"), found

    def _finish_comparison(self) -> None:
        if self._comparison is None:
            return
        (pending, found), self._comparison = self._comparison, None
        pending.wait()
        self._check(found.view(-1, len(self._axes)))

    def _check(self, found: torch.Tensor) -> None:
        for column, axis in enumerate(self._axes):
            for peer in self._sequence.groups[axis]:
                if found[peer, column] != found[self._rank, column]:
                    step = self._sequence.record().steps[-1][0]
                    raise self._diverged(
                        f"rank {max(peer, self._rank)} made other calls on {axis} than rank {min(peer, self._rank)} "
                        f"before step {step}"
                    )

    def _diverged(self, otherwise: str) -> RanksDiverged:
        """The error of which all ranks know; ``otherwise``: what to say if they do not tell what they called."""
        self._watcher.stop()
        text = self._watcher.explain(ANSWER_S) or otherwise
        self._watcher.wait_for_others()
        return RanksDiverged(text)


def groups_of(shape: MeshShape, rank: int) -> dict[str, tuple[int, ...]]:
    """Global ranks of the group of ``rank`` along every axis, of all as ``world``, and along several axes together.

    The same names on all ranks.
    """
    places = [shape.coordinates(peer) for peer in range(shape.world_size)]
    own = places[rank]

    def group(members: Sequence[str]) -> tuple[int, ...]:
        others = [axis.name for axis in shape.axes if axis.name not in members and axis.degree > 1]
        return tuple(peer for peer, place in enumerate(places) if all(place[axis] == own[axis] for axis in others))

    found = {name: group(shape.members(name)) for name in shape.names}
    found["world"] = tuple(range(shape.world_size))
    real = [axis.name for axis in shape.axes if axis.degree > 1]
    for count in range(2, len(real) + 1):
        found |= {"+".join(members): group(members) for members in itertools.combinations(real, count)}
    return found


def _names(mesh: Mesh, groups: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Name of torch's group to that of the axis. Groups of several axes are made by who needs them, not here."""
    found: dict[str, str] = {}
    for axis in groups:
        group = mesh.group(axis) if axis != "world" and "+" not in axis else None
        if group is not None:
            found[group.group_name] = axis
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _root(error: BaseException | None) -> BaseException | None:
    """The error that others were made from."""
    while error is not None and error.__cause__ is not None:
        error = error.__cause__
    return error
