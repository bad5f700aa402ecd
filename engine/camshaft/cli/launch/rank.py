"""One rank from its start to its exit record: signals, watchdog, logs, errors, exit status."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn, TextIO

from camshaft import ending
from camshaft.cli.launch import exits, terminal, waiting
from camshaft.cli.launch.heartbeat import Heartbeat
from camshaft.cli.launch.logs import messages
from camshaft.cli.launch.watch import GRACE_S, QUICK_S, StopSignal, Watchdog, watch_list
from camshaft.cli.streams import put
from camshaft.distributed import JOB_VARIABLE, forget_meeting
from camshaft.environment import Environment
from camshaft.errors import CamshaftError, Interrupted, RecipeError
from camshaft.processes import Process, alive, launcher_of, send
from camshaft.rundir import RunDirectory, utc_now

FRONT_VARIABLE, RUN_VARIABLE = "CAMSHAFT_FRONT", "CAMSHAFT_RUN"
"""What ``camshaft train`` tells its ranks beside its private folder: itself (pid:start), and the run directory."""

_LEAVE_S = 10.0


@dataclass(frozen=True, slots=True)
class Front:
    """The ``camshaft train`` that owns this rank."""

    process: Process
    job: Path
    run: Path

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Front | None:
        """From the environment; None for a rank that a user's own launcher started."""
        process = Process.parse(environ.get(FRONT_VARIABLE, ""))
        if process is None or not environ.get(JOB_VARIABLE) or not environ.get(RUN_VARIABLE):
            return None
        return cls(process, Path(environ[JOB_VARIABLE]), Path(environ[RUN_VARIABLE]))


class Station:
    """What a rank has around its work: how it is stopped, how it shows progress, where it leaves its record.

    ``keeps``: when it is asked to stop, it has something to write first.
    """

    def __init__(self, environment: Environment, front: Front | None, *, keeps: bool = True) -> None:
        self.environment, self.front = environment, front
        self.heartbeat = Heartbeat()
        grace = GRACE_S if keeps else QUICK_S
        self.stop = StopSignal(force=self.force, grace_s=grace, repeat_ends=front is None, keeps=keeps)
        self.forced: Callable[[], None] = lambda: None
        """Called before ``force`` ends the process, which leaves no other time to tidy up."""
        self.directory: RunDirectory | None = None
        self._log: IO[str] | None = None
        self._terminal: TextIO = sys.stderr
        self._recorded = threading.Lock()

    def enter(self, directory: RunDirectory) -> None:
        """Take up the run directory: register in its heartbeat, log into it. Ranks other than 0 write only there."""
        rank = self.environment.rank
        self.directory = directory
        exits.record_path(directory.logs, rank).unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError, ValueError):  # a node without a file of its own
            self.heartbeat.attach(directory.heartbeat, rank)
        self._log = (directory.logs / f"rank_{rank}.log").open("a", buffering=1)
        self._log.write(f"{utc_now()} rank {rank} of {self.environment.world_size}, pid {os.getpid()}\n")
        if self.environment.launcher != "none":
            self._route(self._log)

    def _route(self, log: IO[str]) -> None:
        faulthandler.enable(log)
        if self.environment.rank == 0:
            if self.front is not None:
                terminal.borrow(self.front.job)
            return
        self._terminal = os.fdopen(os.dup(2), "w", buffering=1)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log.fileno(), stream.fileno())

    def record(self, status: int, kind: exits.Kind, error: str) -> None:
        """Leave the exit record; the first one stays."""
        if self.directory is None or not self._recorded.acquire(blocking=False):
            return
        record = exits.make_record(self.environment.rank, status, kind, error, self.heartbeat.progress)
        with contextlib.suppress(OSError):  # the disk is full, or the folder is gone: the exit status still says it
            exits.write_record(self.directory.logs, record)

    def note(self, text: str) -> None:
        """Write to the rank's log."""
        if self._log is not None:
            with contextlib.suppress(OSError, ValueError):
                self._log.write(text.rstrip() + "\n")

    def close(self) -> None:
        """Give back the signals and the log, where the process goes on."""
        self.stop.uninstall()
        if self._log is not None:
            self._log.close()

    def force(self, status: int, kind: exits.Kind, reason: str) -> NoReturn:
        """End this process from any thread, now."""
        self.record(status, kind, reason)
        self.note(f"{utc_now()} ended with status {status}: {reason}")
        if kind == "orphan" and self.front is not None:
            _end_torchrun()
            shutil.rmtree(self.front.job, ignore_errors=True)  # nobody else is left to do it
        forget_meeting()
        self.forced()
        if self.environment.rank == 0 and not self._has_front():
            head = "stopped" if status == Interrupted.exit_status else "error"
            on = f". {self.directory.going_on()}" if self.directory is not None and kind == "orphan" else ""
            with contextlib.suppress(OSError):  # the terminal that a front lent is still open here
                os.write(2, f"{head}: {reason}{on}\n".encode())
        os._exit(status)

    def tell(self, error: BaseException, kind: exits.Kind) -> None:
        """Say on the terminal what ended a rank that has no front to say it: rank 0, else the first that failed."""
        rank = self.environment.rank
        if self._has_front() or (rank and (kind != "error" or not self._is_first())):
            return
        head = "stopped" if isinstance(error, Interrupted) else f"error: rank {rank}" if rank else "error"
        for text in self.words(error):
            put(self._terminal, f"{head}: {text}")
        if kind == "connection" and self.directory is not None:
            put(
                self._terminal,
                f"another rank ended first; its log is in {self.directory.logs}. {self.directory.going_on()}",
            )

    def words(self, error: BaseException) -> list[str]:
        """What to tell of an error: of a collective that timed out, which rank did not come to it."""
        if self.directory is not None and self.environment.nodes == 1:  # other nodes' beats may come late
            text = waiting.explain(error, self.directory.heartbeat, self.environment.rank)
            if text:
                return [text]
        return _lines_of(error)

    def _has_front(self) -> bool:
        """Whether there is a front, still alive, to say how the run ended."""
        return self.front is not None and alive(self.front.process)

    def _is_first(self) -> bool:
        """Whether no other rank has told of an error of its own; rank 0 gets half a second to do so."""
        if self.directory is None:
            return False
        time.sleep(0.5)
        return not any(
            '"kind": "error"' in path.read_text()
            for path in self.directory.logs.glob("rank_*.exit.json")
            if path != exits.record_path(self.directory.logs, self.environment.rank)
        )


def _lines_of(error: BaseException) -> list[str]:
    if isinstance(error, RecipeError):
        return [str(problem) for problem in error.problems]
    return [str(error) if isinstance(error, CamshaftError) else f"{type(error).__name__}: {error}"]


def supervised(environment: Environment, work: Callable[[Station], int], *, keeps: bool = True) -> int:
    """Run ``work`` as one rank and return its exit status. ``keeps``: as for ``Station``.

    In a launched rank every error ends the process at once, with a record and without waiting for peers. In one
    process of its own errors are raised to the caller, and the signals are given back.
    """
    front = Front.of(os.environ)
    station = Station(environment, front, keeps=keeps)
    if threading.current_thread() is threading.main_thread():
        station.stop.install()
    if environment.launcher == "none":
        return _alone(station, work)
    Watchdog(watch_list(front.process if front else None, environment.launcher), station.stop, station.force).start()
    ending.register(lambda error: station.force(error.exit_status, "error", str(error)))
    try:
        if front is not None:
            station.enter(RunDirectory(front.run))
        with messages(station.note, show=environment.rank == 0):
            status = work(station)
    except BaseException as error:
        status, kind = _ended(station, error)
        station.tell(error, kind)
        if kind != "end":
            forget_meeting()
            _flush()
            os._exit(status)
    else:
        station.record(status, "end", "")
    _leave(status)
    return status


def _alone(station: Station, work: Callable[[Station], int]) -> int:
    try:
        with messages(station.note, show=True):
            status = work(station)
    except BaseException as error:
        _ended(station, error)
        raise
    else:
        station.record(status, "end", "")
        return status
    finally:
        station.close()


def _ended(station: Station, error: BaseException) -> tuple[int, exits.Kind]:
    """Record an error, with its traceback in the rank's log."""
    if isinstance(error, Interrupted):
        station.record(error.exit_status, "end", str(error))
        return error.exit_status, "end"
    status, kind = exits.classify(error)
    station.record(status, kind, "; ".join(station.words(error)))
    station.note("".join(traceback.format_exception(error)))
    return status, kind


def _end_torchrun() -> None:
    """The agent that a front started which is gone: it would wait for minutes, at its end, for a file of the job's."""
    kind, agent = launcher_of(os.getpid()) or ("", None)
    if kind == "torchrun" and agent is not None:
        send(agent, signal.SIGKILL)


def _leave(status: int) -> None:
    """The work is done: libraries that hang while the interpreter ends do not keep the job."""

    def end() -> None:
        time.sleep(_LEAVE_S)
        _flush()
        os._exit(status)

    threading.Thread(target=end, name="camshaft-leave", daemon=True).start()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
