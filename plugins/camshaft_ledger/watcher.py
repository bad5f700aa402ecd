"""A thread that looks whether this rank still moves, and if not, whether it waits for calls that will never come.

Ranks talk over the store that they met in, since what they would otherwise talk over is what is stuck. Nothing is
written there while a run goes on.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from camshaft import ending
from camshaft.errors import RanksDiverged
from camshaft_ledger.compare import Records, diverged
from camshaft_ledger.sequence import Record, Sequence

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

POLL_S = 0.25
_AGAIN_S = 1.0
_TOGETHER_S = 1.5  # how long the first to know waits for the others, so that none of them sees only a lost connection


class Watcher:
    """One rank's eye on ``sequence``. A rank that is slow has called less, but nothing else, and is left alone."""

    def __init__(self, sequence: Sequence, store: Store, rank: int, stall_s: float, level: Callable[[], bool]) -> None:
        """``level``: whether all ranks are known to have called as much: then each of them computes, and none waits."""
        self._sequence, self._store, self._rank = sequence, store, rank
        self._stall_s, self._level = stall_s, level
        self._ranks = sequence.groups["world"]
        self._stop = threading.Event()
        self._moves, self._since = -1, time.monotonic()
        self._shown, self._asked, self._asked_at = "", b"", 0.0
        self._writing = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="camshaft-ledger", daemon=True)

    def start(self) -> None:
        """Begin to look, from a thread."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more; returns when the thread has ended."""
        self._stop.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def explain(self, limit_s: float) -> str | None:
        """Ask all ranks for what they called, and say where they differ; None if they do not, or do not answer.

        The same text on all ranks that ask.
        """
        with contextlib.suppress(RuntimeError):  # the store ended with the rank that keeps it
            self._ask()
            limit = time.monotonic() + limit_s
            while time.monotonic() < limit:
                self.publish()
                if self._verdict() or diverged(self._records()):
                    return self._settle()
                time.sleep(0.05)
        return None

    def publish(self) -> None:
        """Put this rank's last steps into the store, unless they are there."""
        with self._writing, contextlib.suppress(RuntimeError):  # as in explain
            text = self._sequence.record().dump()
            if text != self._shown:
                self._store.set(f"calls/{self._rank}", text)
                self._shown = text

    def wait_for_others(self) -> None:
        """Return when every rank knows the verdict, or has had the time to see it."""
        with contextlib.suppress(RuntimeError):
            count, limit = self._store.add("ready", 1), time.monotonic() + _TOGETHER_S
            while count < len(self._ranks) and time.monotonic() < limit:
                time.sleep(0.05)
                count = self._store.add("ready", 0)

    def _run(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store ended with the rank that keeps it: the run is over
            while not self._stop.wait(POLL_S):
                self._look()

    def _look(self) -> None:
        stalled = self._is_stalled()
        if stalled:
            self._ask()
        if self._answer() or stalled:
            self.publish()
        differ = bool(self._verdict()) or (stalled and diverged(self._records()) is not None)
        if differ and not self._stop.is_set():
            text = self._settle()
            self.wait_for_others()
            if not self._stop.is_set():
                ending.end(RanksDiverged(text))

    def _is_stalled(self) -> bool:
        """Whether this rank has not called anything for a while, and may be waiting for another, or another for it.

        Without the latter a run of slow steps would write again and again, and a store that is a file only grows.
        """
        moves, now = self._sequence.moves, time.monotonic()
        if moves != self._moves:
            self._moves, self._since = moves, now
        return now - self._since >= self._stall_s and not self._level()

    def _ask(self) -> None:
        """Let every rank publish: this one is stuck, and the others may not be."""
        if time.monotonic() - self._asked_at > _AGAIN_S:
            self._asked_at = time.monotonic()
            self._store.add("asked", 1)

    def _answer(self) -> bool:
        """Whether somebody asked."""
        if not self._store.check(["asked"]):
            return False
        asked = self._store.get("asked")
        anew, self._asked = asked != self._asked, asked
        return anew

    def _records(self) -> Records:
        keys = {rank: f"calls/{rank}" for rank in self._ranks}
        return {rank: Record.parse(self._store.get(key).decode()) for rank, key in keys.items() if self._there(key)}

    def _there(self, key: str) -> bool:
        return bool(self._store.check([key]))

    def _verdict(self) -> str:
        return self._store.get("verdict").decode() if self._there("verdict") else ""

    def _settle(self) -> str:
        """What all ranks will say: the first verdict, after everybody had the time to answer.

        Two ranks show that they differ; it takes all of them to tell which one is wrong.
        """
        if not self._verdict():
            self._ask()
            limit = time.monotonic() + 3 * POLL_S
            while time.monotonic() < limit and not self._verdict():
                time.sleep(0.05)
            self._store.compare_set("verdict", "", diverged(self._records()) or "")
        return self._verdict()
