"""Memory that the ranks of one node share: each writes what it is about to call, and looks what its peers called.

Of two ranks that differ in a call, the one that comes second sees it before it sends anything. That matters where the
collective itself would not hang but end the process: gloo's all-reduce of unequal sizes does.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

    from camshaft_ledger.sequence import Groups

SLOTS, STEPS = 64, "steps"
_SLOT = struct.Struct("=Q")
_ROW = (1 + SLOTS) * _SLOT.size
_LOW = 0xFFFFFFFF


class Board:
    """For every rank and axis the number of calls so far, and a ring of the last ``SLOTS``: number and fingerprint.

    A row of eight-byte words for each; one more row a rank counts its steps.
    """

    def __init__(self, memory: mmap.mmap, rank: int, groups: Groups, here: frozenset[int]) -> None:
        self._memory = memory
        rows = {axis: index for index, axis in enumerate((*groups, STEPS))}
        shared = {**groups, STEPS: groups["world"]}
        self._own = {axis: (rank * len(rows) + index) * _ROW for axis, index in rows.items()}
        self._peers = {
            axis: tuple((peer, (peer * len(rows) + rows[axis]) * _ROW) for peer in ranks if peer in here - {rank})
            for axis, ranks in shared.items()
        }
        self._everybody = here == frozenset(groups["world"])

    @staticmethod
    def bytes_for(groups: Groups) -> int:
        """How much memory all ranks need together."""
        return len(groups["world"]) * (len(groups) + 1) * _ROW

    @classmethod
    def open(cls, store: Store, rank: int, groups: Groups) -> Board:
        """Meet the other ranks of this node; collective over all ranks. The file has no name any more afterwards."""
        node = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        everyone, size = groups["world"], cls.bytes_for(groups)
        path = None
        if store.add(f"node/{node}", 1) == 1:
            handle, path = tempfile.mkstemp(prefix="camshaft-ledger-")
            os.ftruncate(handle, size)
            os.close(handle)
            store.set(f"file/{node}", path)
        memory = _mapped(store.get(f"file/{node}").decode(), size)
        store.set(f"at/{rank}", node if memory is not None else "")
        nodes = {peer: store.get(f"at/{peer}").decode() for peer in everyone}
        if path is not None:
            Path(path).unlink()
        here = frozenset(peer for peer, where in nodes.items() if where == node) if memory is not None else frozenset()
        return cls(memory or mmap.mmap(-1, size), rank, groups, here)

    def differs(self, axis: str, number: int, mark: int) -> int | None:
        """Note call ``number`` on ``axis``; a rank that made another one in its place, or None."""
        place = (1 + number % SLOTS) * _SLOT.size
        value = (number & _LOW) << 32 | mark
        memory, own = self._memory, self._own[axis]
        _SLOT.pack_into(memory, own + place, value)
        _SLOT.pack_into(memory, own, number)
        for peer, offset in self._peers[axis]:
            (other,) = _SLOT.unpack_from(memory, offset + place)
            if other != value and other >> 32 == value >> 32:
                return peer
        return None

    def step(self, number: int) -> None:
        """Note that ``number`` steps are over, or the run itself as one more."""
        _SLOT.pack_into(self._memory, self._own[STEPS], number)

    def level(self) -> bool:
        """Whether nobody has called more than its peers, or done more steps; False where not all ranks are here."""
        return self._everybody and all(
            _SLOT.unpack_from(self._memory, offset) == _SLOT.unpack_from(self._memory, self._own[axis])
            for axis, peers in self._peers.items()
            for _, offset in peers
        )


def _mapped(path: str, size: int) -> mmap.mmap | None:
    """None where the file cannot be seen: in another container of the same machine."""
    with contextlib.suppress(OSError, ValueError), Path(path).open("r+b") as file:
        return mmap.mmap(file.fileno(), size)
    return None
