"""Processes as /proc shows them: identity that survives reuse of a pid, ancestors, and signals that hit only ours."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")


class Process(NamedTuple):
    """A process: its pid, and when it started in clock ticks since boot. The pair is never used again."""

    pid: int
    start: int

    def __str__(self) -> str:
        return f"{self.pid}:{self.start}"

    @classmethod
    def parse(cls, text: str) -> Process | None:
        """The inverse of ``str``; None for anything else."""
        pid, _, start = text.partition(":")
        return cls(int(pid), int(start)) if pid.isdigit() and start.isdigit() else None


class Stat(NamedTuple):
    """What is used of /proc/PID/stat (proc(5)): fields 3, 4, 6 and 22."""

    state: str
    parent: int
    session: int
    start: int


def stat(pid: int) -> Stat | None:
    """The kernel's record of ``pid``; None if there is no such process."""
    try:
        text = (PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return None
    fields = text[text.rfind(")") + 2 :].split()  # the name, field 2, may hold spaces and brackets
    return Stat(fields[0], int(fields[1]), int(fields[3]), int(fields[19]))


def identify(pid: int) -> Process | None:
    """The process that has ``pid`` now; None if it is gone or only waits to be reaped."""
    found = stat(pid)
    return None if found is None or found.state in "ZX" else Process(pid, found.start)


def myself() -> Process:
    """This process."""
    found = identify(os.getpid())
    assert found is not None
    return found


def alive(process: Process) -> bool:
    """Whether ``process`` itself, not a later one with its pid, still runs."""
    return identify(process.pid) == process


def send(process: Process, signum: int) -> bool:
    """Send a signal to exactly this process; False if it is gone. The pidfd closes the race with reuse of the pid."""
    try:
        handle = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    except OSError:  # a kernel or sandbox without pidfds
        handle = -1
    try:
        if not alive(process):
            return False
        if handle >= 0:
            signal.pidfd_send_signal(handle, signum)
        else:
            os.kill(process.pid, signum)
    except OSError:
        return False
    else:
        return True
    finally:
        if handle >= 0:
            os.close(handle)


def command(pid: int) -> list[str]:
    """Arguments of ``pid``; empty if it is gone or a kernel thread."""
    try:
        text = (PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return []
    return [os.fsdecode(part) for part in text.split(b"\0") if part]


def ancestors(pid: int, most: int = 16) -> Iterator[Process]:
    """Parent of ``pid``, its parent, and so on."""
    for _ in range(most):
        found = stat(pid)
        if found is None or found.parent <= 0:
            return
        pid = found.parent
        process = identify(pid)
        if process is None:
            return
        yield process


def in_session(session: int) -> list[Process]:
    """Every live process of a session."""
    found = []
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            record = stat(int(entry.name))
            if record is not None and record.session == session and record.state not in "ZX":
                found.append(Process(int(entry.name), record.start))
    return found


def kernel_memory_kills() -> int:
    """How often this machine's kernel has killed a process for want of memory; 0 where it does not say."""
    try:
        lines = (PROC / "vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def launcher_of(pid: int) -> tuple[str, Process] | None:
    """The nearest ancestor that is a launcher's agent on this node, and whose it is; None if there is none.

    A wrapper script between the agent and the rank is passed over.
    """
    for process in ancestors(pid):
        words = command(process.pid)
        if "deepspeed.launcher.launch" in words:
            return "deepspeed", process
        if any(_is_torchrun(word) for word in words[:4]):
            return "torchrun", process
        if words and words[0].startswith("slurmstepd"):
            return "slurm", process
    return None


def _is_torchrun(word: str) -> bool:
    return Path(word).name == "torchrun" or word in ("torch.distributed.run", "torch.distributed.launch")


def deepspeed_runner_of(agent: Process) -> Process | None:
    """The ``deepspeed`` command that started ``agent``, if it is (still) its parent."""
    parent = next(ancestors(agent.pid), None)
    if parent is None:
        return None
    names = {Path(word).name for word in command(parent.pid)[:4]}
    return parent if names & {"deepspeed", "deepspeed.pt", "ds", "deepspeed.launcher.runner"} else None
