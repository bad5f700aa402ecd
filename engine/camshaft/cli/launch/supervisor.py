"""The front: starts the ranks through a launcher, owns them, and says how they ended."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from camshaft.cli.launch import exits, heartbeat, terminal
from camshaft.cli.launch.cause import Outcome, RankView, judge
from camshaft.cli.launch.rank import FRONT_VARIABLE, RUN_VARIABLE
from camshaft.cli.launch.watch import POLL_S, StopSignal
from camshaft.distributed import JOB_VARIABLE
from camshaft.processes import alive, in_session, kernel_memory_kills, myself, send, stat
from camshaft.rundir import RunDirectory, utc_now

PEERS_S = 10.0
"""How long the other ranks may take to end by themselves after one failed."""

STOP_S = 22.0
"""How long all ranks may take to write a checkpoint and end after a request to stop; ranks limit themselves to less."""

_LAUNCHER_S = 10.0  # deepspeed looks once a second, torchrun takes a few to tidy up
_KILLED_S = 5.0  # a process that was killed frees its memory first
_SOCKET_PATH_LIMIT = 80


@dataclass(frozen=True, slots=True)
class Job:
    """What to start, and where it writes.

    ``line`` gives the launcher's command line for the job's private folder; ``environment`` is what it starts with.
    """

    launcher: str
    processes: int
    line: Callable[[Path], list[str]]
    directory: RunDirectory
    environment: Mapping[str, str]


def supervise(job: Job, stop: StopSignal) -> Outcome:
    """Run the job to its end and return how it ended. No process of it is left, whatever happens here.

    ``stop`` is installed and has neither a time limit nor a limit on requests: both are kept here.
    """
    folder = _private_folder()
    lender = terminal.Lender(folder)
    supervisor: Supervisor | None = None
    try:
        heartbeat.create(job.directory.heartbeat, job.processes)
        for number in range(job.processes):
            exits.record_path(job.directory.logs, number).unlink(missing_ok=True)
        supervisor = Supervisor(job, folder, stop)
        return supervisor.run()
    finally:
        if supervisor is not None:
            supervisor.end_all()
        lender.close()
        shutil.rmtree(folder, ignore_errors=True)


def _private_folder() -> Path:
    """A new folder with mode 0700, with a path short enough for a socket in it."""
    base = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="camshaft-", dir=base if len(base) < _SOCKET_PATH_LIMIT else "/tmp"))  # noqa: S108


class Supervisor:
    """One launcher and its ranks, looked at four times a second."""

    def __init__(self, job: Job, folder: Path, stop: StopSignal) -> None:
        self._job, self._stop = job, stop
        self._ranks: dict[int, RankView] = {}
        self._deadline: float | None = None
        self._asked: set[int] = set()
        self._sessions: set[int] = set()
        self._memory_kills = kernel_memory_kills()
        self._process = self._start(folder)

    def _start(self, folder: Path) -> subprocess.Popen[bytes]:
        job = self._job
        line = job.line(folder)
        own = {
            JOB_VARIABLE: str(folder),
            FRONT_VARIABLE: str(myself()),
            RUN_VARIABLE: str(job.directory.path.resolve()),
        }
        environment = {**job.environment, **own}
        if "--include" in line:
            environment.pop("CUDA_VISIBLE_DEVICES", None)  # deepspeed sets it from --include, and complains about ours
        with (job.directory.logs / "launcher.log").open("ab") as log:
            log.write(f"{utc_now()} {line}\n".encode())
            log.flush()
            return subprocess.Popen(
                line, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def run(self) -> Outcome:
        """Watch until nothing runs any more, or until time is up."""
        while True:
            self._look()
            if self._stop.requested:
                self._pass_on_stop()
            launcher_done = self._process.poll() is not None
            if launcher_done and all(view.gone_at for view in self._ranks.values()):
                break
            self._limit(launcher_done)
            if self._deadline is not None and time.monotonic() > self._deadline:
                break
            time.sleep(POLL_S)
        return self._outcome()

    def _look(self) -> None:
        for beat in heartbeat.read(self._job.directory.heartbeat):
            if beat.rank not in self._ranks:
                self._meet(beat)
            view = self._ranks[beat.rank]
            view.step, view.phase = beat.step, beat.phase
            if view.gone_at is None and not alive(view.process):
                view.gone_at = time.time()
                view.record = exits.read_record(self._job.directory.logs, view.rank, view.process)

    def _meet(self, beat: heartbeat.Beat) -> None:
        self._ranks[beat.rank] = RankView(beat.rank, beat.process)
        found = stat(beat.process.pid)
        if found is not None and found.start == beat.process.start:
            self._sessions.add(found.session)  # torchrun gives every rank a session of its own

    def _pass_on_stop(self) -> None:
        """Ask the ranks themselves: deepspeed's launcher would kill them. Those that begin later are asked then."""
        self._within(STOP_S if self._stop.requests == 1 and self._ranks else 0.0)
        for view in self._ranks.values():
            if view.gone_at is None and view.rank not in self._asked:
                send(view.process, signal.SIGTERM)
                self._asked.add(view.rank)

    def _limit(self, launcher_done: bool) -> None:
        """Set a time limit where the end has begun."""
        views = self._ranks.values()
        if any(view.failed for view in views):
            stopped = all(view.record and view.record.status == 130 for view in views if view.failed)
            self._within(STOP_S if stopped else PEERS_S)
        elif launcher_done:
            self._within(PEERS_S)
        elif len(views) == self._job.processes and all(view.gone_at for view in views):
            self._within(_LAUNCHER_S)

    def _within(self, seconds: float) -> None:
        limit = time.monotonic() + seconds
        self._deadline = limit if self._deadline is None else min(self._deadline, limit)

    def _outcome(self) -> Outcome:
        launcher_status = self._process.poll()
        self.end_all()
        self._look()
        job = self._job
        views = [self._ranks[number] for number in sorted(self._ranks)]
        faults = [view for view in views if view.record is not None and view.record.kind == "error"]
        unfinished = len(views) < job.processes or any(view.failed for view in views)
        if self._stop.requested and unfinished and not faults and not any(view.step for view in views):
            return Outcome(130, "stopped before the first step")
        kills = kernel_memory_kills() - self._memory_kills
        outcome = judge(views, job.processes, job.launcher, launcher_status, job.directory.logs, kills)
        if self._stop.requests > 1 and outcome.status != 0:
            return Outcome(130, "stopped at once, without a checkpoint of the last step")
        if outcome.from_outside:
            return replace(outcome, message=f"{outcome.message}. {job.directory.going_on()}")
        return outcome

    def end_all(self) -> None:
        """Kill what is left of the job: the ranks, and the sessions that they and the launcher opened; nothing else."""
        for view in self._ranks.values():
            if view.gone_at is None and send(view.process, signal.SIGKILL):
                view.killed = True
        for session in {self._process.pid, *self._sessions} - {os.getsid(0)}:
            for process in in_session(session):
                send(process, signal.SIGKILL)
        self._process.wait()
        limit = time.monotonic() + _KILLED_S
        while any(alive(view.process) for view in self._ranks.values()) and time.monotonic() < limit:
            time.sleep(0.02)
