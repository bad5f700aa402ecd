"""What ends a rank from outside: signals that ask it to stop, and launchers or fronts that are gone."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

from camshaft.cli.launch.exits import Kind
from camshaft.environment import Launcher
from camshaft.processes import Process, alive, command, deepspeed_runner_of, identify, launcher_of, stat

GRACE_S = 20.0
"""How long a rank that was asked to stop may take to write its checkpoint."""

QUICK_S = 5.0
"""The same where nothing would be lost."""

POLL_S = 0.25
_SAME_REQUEST_S = 1.0  # launchers and terminals send one request several times
_WITH_AGENT = ("deepspeed", "torchrun")
_SIGNALS = (signal.SIGTERM, signal.SIGINT)

Force = Callable[[int, Kind, str], NoReturn]
"""Ends this process at once with a status, a kind and a reason."""


def exit_at_once(status: int, kind: Kind, reason: str) -> NoReturn:
    """End without a record."""
    os._exit(status)


class StopSignal:
    """SIGTERM, SIGINT and the terminal's end (SIGHUP, unless ignored) as a flag that the loop reads each step.

    The kernel-side part of Python's signal handling writes to a socket that a thread reads: so the flag is set, and
    the time limit runs, also while the main thread waits in a collective and could not run a handler.
    """

    def __init__(
        self,
        *,
        force: Force = exit_at_once,
        grace_s: float | None = GRACE_S,
        repeat_ends: bool = True,
        keeps: bool = True,
    ) -> None:
        """``grace_s``: how long the process may take to stop by itself. ``keeps``: it has something to write until
        then, so that to be ended before is a failure.
        """
        self.requested = 0
        """0, or the number of the signal that asked this process to stop."""
        self.requests = 0
        """How many requests came, not counting echoes of one."""
        self._force, self._grace_s, self._repeat_ends, self._keeps = force, grace_s, repeat_ends, keeps
        self._first = 0.0
        self._last: dict[int, float] = {}
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._before: dict[int, Any] = {}

    def install(self) -> StopSignal:
        """Take over the signals. Only the main thread may call this."""
        ignored = signal.getsignal(signal.SIGHUP) != signal.SIG_DFL  # nohup
        wanted = _SIGNALS if ignored else (*_SIGNALS, signal.SIGHUP)
        self._before = {signum: signal.signal(signum, _noted) for signum in wanted}
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=_forget_in_child)
        threading.Thread(target=self._listen, name="camshaft-stop", daemon=True).start()
        return self

    def uninstall(self) -> None:
        """Give the signals back to whoever had them."""
        if self._before:
            signal.set_wakeup_fd(-1)
        else:
            self._reader.close()  # no thread has it
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._writer.close()  # ends the thread

    def request(self, signum: int = signal.SIGTERM) -> None:
        """Ask for a stop from inside, as a signal would."""
        self._writer.send(bytes([signum]))

    def _listen(self) -> None:
        while True:
            wait = None
            if self._first and self._grace_s is not None:
                wait = max(0.0, self._first + self._grace_s - time.monotonic())
            ready, _, _ = select.select([self._reader], [], [], wait)
            if not ready and self._keeps:
                self._force(1, "forced", f"could not stop within {self._grace_s:.0f} s of the request")
            elif not ready:
                self._force(130, "forced", "asked to stop, and stopped at once")
            received = self._reader.recv(64)
            if not received:
                self._reader.close()
                return
            for signum in received:
                if signum in self._before or signum in _SIGNALS:
                    self._take(signum)

    def _take(self, signum: int) -> None:
        now, before = time.monotonic(), self._last.get(signum)
        self._last[signum] = now
        if not self.requested:
            self._first, self.requested, self.requests = now, signum, 1
        elif before is not None and now - before > _SAME_REQUEST_S:
            self.requests += 1
            if self._repeat_ends:
                without = " without a checkpoint" if self._keeps else ""
                self._force(130, "forced", f"asked a second time to stop, and stopped at once{without}")


def _noted(signum: int, frame: FrameType | None) -> None:
    """The interpreter has written the signal's number to the wakeup socket already."""


def _forget_in_child() -> None:
    """A forked child shares the socket: its signals must not stop its parent."""
    signal.set_wakeup_fd(-1)
    for signum in (*_SIGNALS, signal.SIGHUP):
        if signal.getsignal(signum) is _noted:
            signal.signal(signum, signal.SIG_DFL)


@dataclass(frozen=True, slots=True)
class Watched:
    """A process that this rank must not outlive."""

    process: Process
    what: str
    checkpoint_first: bool = False


class Watchdog:
    """Ends this rank within a second of the end of its launcher or front, however those ended."""

    def __init__(self, watched: list[Watched], stop: StopSignal, force: Force) -> None:
        self._watched, self._stop, self._force = watched, stop, force
        self._parent = os.getppid()

    def start(self) -> None:
        """Look once now, then from a thread every quarter of a second."""
        self._look()
        threading.Thread(target=self._run, name="camshaft-watchdog", daemon=True).start()

    def _run(self) -> None:
        while True:
            time.sleep(POLL_S)
            self._look()

    def _look(self) -> None:
        gone = [watched for watched in self._watched if not alive(watched.process)]
        if os.getppid() != self._parent:
            gone.append(Watched(Process(self._parent, 0), "parent process"))
        for watched in gone:
            if watched in self._watched:
                self._watched.remove(watched)
            if watched.checkpoint_first:
                self._stop.request()
            elif not self._stop.requested:  # a stop that is under way ends by itself, with a time limit of its own
                self._force(1, "orphan", f"its {watched.what} (pid {watched.process.pid}) is gone")


def watch_list(front: Process | None, launcher: Launcher) -> list[Watched]:
    """Whom this rank, which ``launcher`` started, must not outlive.

    The deepspeed command that a user started is special: it dies of SIGTERM and leaves everything running, so its end
    is taken for the request to stop that it should have passed on.
    """
    found = [Watched(front, "front, `camshaft train`,")] if front else []
    agent = launcher_of(os.getpid())
    if agent is None:
        parent = identify(os.getppid())
        if launcher in _WITH_AGENT and parent is not None and parent.pid == 1:
            return [*found, Watched(Process(0, 0), "launcher")]  # it was gone before this rank began
        return found
    found.append(Watched(agent[1], "launcher"))
    if agent[0] == "deepspeed" and front is None:
        runner = deepspeed_runner_of(agent[1])
        if runner is not None:
            found.append(Watched(runner, "deepspeed command", checkpoint_first=True))
        elif _is_adopted(agent[1]):
            found.append(Watched(Process(0, 0), "deepspeed command"))
    return found


def _is_adopted(agent: Process) -> bool:
    """Whether a one-node agent lost the command that started it (which then was killed while the ranks began)."""
    record = stat(agent.pid)
    local = any(word.startswith("--world_info=eyJsb2NhbGhvc3Qi") for word in command(agent.pid))  # {"localhost"
    return local and record is not None and record.parent == 1
