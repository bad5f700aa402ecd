"""Which rank ended a run, and of what: out of exit records, vanished processes and the launcher's own end."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from pathlib import Path

from camshaft.cli.launch.exits import ExitRecord, is_out_of_memory
from camshaft.cli.launch.heartbeat import doing
from camshaft.errors import OutOfMemory, RecipeError
from camshaft.processes import Process

_KNOWN = frozenset({2, 3, 4, 5, 130})
_ORDER = {"error": 0, "forced": 1, "orphan": 2, "connection": 3}
"""Kinds of record that tell of a failure, the most telling first."""

_CRASH = re.compile(r"Fatal Python error: (.+)")
_TAIL_BYTES = 20_000


@dataclass(slots=True)
class RankView:
    """A rank as the front sees it."""

    rank: int
    process: Process
    step: int = 0
    phase: str = "start"
    record: ExitRecord | None = None
    gone_at: float | None = None
    """When it was first seen to be gone, in seconds since 1970."""
    killed: bool = False
    """Whether the front killed it: then its end is not the cause."""

    @property
    def failed(self) -> bool:
        return self.gone_at is not None and (self.record is None or self.record.status != 0)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended: exit status, and one message for people (empty when all went well).

    ``from_outside``: its processes were ended or lost, so that the same command may well come further.
    """

    status: int
    message: str = ""
    from_outside: bool = False


def judge(
    ranks: list[RankView], processes: int, launcher: str, launcher_status: int | None, logs: Path, memory_kills: int
) -> Outcome:
    """The outcome of a run whose ranks are all gone.

    ``launcher_status``: as ``Popen.returncode``, None when the front ended the launcher; ``memory_kills``: how many
    processes this machine's kernel killed for memory meanwhile.
    """
    records = [view.record for view in ranks if view.record is not None]
    if len(records) == processes and all(record.status in (0, 130) for record in records):
        stopped = next((record for record in records if record.status == 130), None)
        return Outcome(130, stopped.error) if stopped else Outcome(0)
    vanished = [view for view in ranks if view.gone_at is not None and view.record is None and not view.killed]
    failed = sorted((r for r in records if r.kind in _ORDER), key=lambda record: (_ORDER[record.kind], record.time))
    first = min(vanished, key=lambda view: view.gone_at or 0.0, default=None)
    if first is not None and not (failed and failed[0].kind == "error" and failed[0].time < (first.gone_at or 0) - 0.5):
        others = {record.status for record in records}
        return _vanished(first, launcher, launcher_status, logs, memory_kills, others)
    stuck = [view for view in ranks if view.killed and view.record is None]
    if failed and failed[0].kind != "orphan":
        return _recorded(failed[0], logs, stuck)
    if not failed and stuck and (launcher_status is None or launcher_status >= 0):
        view = stuck[0]
        text = f"rank {view.rank} did not stop in time, at step {view.step} during {doing(view.phase)}; it was killed"
        return Outcome(1, text, from_outside=True)
    return _launcher_ended(ranks, processes, launcher, launcher_status, logs)


def _recorded(record: ExitRecord, logs: Path, stuck: list[RankView]) -> Outcome:
    status = record.status if record.status in _KNOWN else 1
    log = logs / f"rank_{record.rank}.log"
    text = f"rank {record.rank} at step {record.step} during {doing(record.phase)}: {record.error.rstrip('.')}"
    if record.kind == "connection" and stuck and " has been at step " not in record.error:
        view = stuck[0]
        text += f"; rank {view.rank} did not answer, at step {view.step} during {doing(view.phase)}, and was killed"
    if status != RecipeError.exit_status:  # of which all that there is to know is told
        text += f". Log: {log}"
    return Outcome(status, text, from_outside=record.kind != "error")


def _vanished(
    view: RankView, launcher: str, status: int | None, logs: Path, memory_kills: int, others: set[int]
) -> Outcome:
    """``others``: statuses that other ranks ended with, any of which may be the one that the launcher passes on."""
    log = logs / f"rank_{view.rank}.log"
    crash = _CRASH.findall(tail(log))
    number = _signal_of(view.process.pid, launcher, status, tail(logs / "launcher.log"))
    code = _code_of(view.process.pid, launcher, status, tail(logs / "launcher.log"), others)
    if crash:
        what = f"crashed ({crash[-1]})"
    elif memory_kills and number in (None, signal.SIGKILL):
        what = "was killed by the kernel because memory ran out (its count of such kills rose)"
    elif number == signal.SIGKILL:
        what = "was killed (SIGKILL; often the kernel's out-of-memory killer)"
    elif number is not None:
        what = f"was killed ({signal.Signals(number).name})"
    elif code is not None:
        what = f"ended by itself with status {code}, without an error (a call of os._exit, or a library's exit)"
    else:
        what = "ended without a word (usually SIGKILL, often from the kernel's out-of-memory killer)"
    killed_for_memory = bool(memory_kills) and not crash and number in (None, signal.SIGKILL)
    text = f"rank {view.rank} {what} at step {view.step} during {doing(view.phase)}. Log: {log}"
    return Outcome(OutOfMemory.exit_status if killed_for_memory else 1, text, from_outside=True)


def _signal_of(pid: int, launcher: str, status: int | None, log: str) -> int | None:
    """The signal that ended ``pid``, as its launcher tells; None if it does not."""
    told = re.search(rf"exitcode\s*:\s*-(\d+) \(pid: {pid}\)", log)
    if launcher == "torchrun" and told is None:
        told = re.search(rf"failed \(exitcode: -(\d+)\) local_rank: \d+ \(pid: {pid}\)", log)
    number = int(told.group(1)) if told else 256 - status if status is not None and status > 128 else 0
    return number if number in set(signal.Signals) else None


def _code_of(pid: int, launcher: str, status: int | None, log: str, others: set[int]) -> int | None:
    """The status with which ``pid`` ended by itself, as its launcher tells; None if it does not, or not whose it is."""
    told = re.search(rf"exitcode\s*:\s*(\d+)\s*\(pid: {pid}\)", log)
    told = told or re.search(rf"failed \(exitcode: (\d+)\) local_rank: \d+ \(pid: {pid}\)", log)
    if told is not None:
        return int(told.group(1))
    if launcher != "deepspeed" or status is None or not 0 < status <= 128 or status in others:
        return None  # torchrun itself ends with 1
    return status


def _launcher_ended(ranks: list[RankView], processes: int, launcher: str, status: int | None, logs: Path) -> Outcome:
    log = logs / "launcher.log"
    if status is None:
        how = "was stopped"
    elif status < 0:
        how = f"was killed ({signal.Signals(-status).name})"
    else:
        how = f"ended with status {status}"
    missing = sorted(set(range(processes)) - {view.rank for view in ranks})
    if missing and not ranks:
        if is_out_of_memory(tail(log)):
            text = f"memory ran out while the launcher '{launcher}' began. Free some, or raise the limit (ulimit -v)"
            return Outcome(OutOfMemory.exit_status, f"{text}. Log: {log}")
        last = "\n  ".join(tail(log).strip().splitlines()[-12:])
        return Outcome(3, f"the launcher '{launcher}' {how} before a rank began. The end of {log}:\n  {last}")
    if missing:
        return Outcome(1, f"rank {missing[0]} never began, and the launcher '{launcher}' {how}. Log: {log}", True)
    view = max(ranks, key=lambda one: one.step)
    text = f"the launcher '{launcher}' lost its ranks at step {view.step} during {doing(view.phase)}: it {how}"
    return Outcome(1, f"{text}. Log: {log}", from_outside=True)


def tail(path: Path) -> str:
    """The last part of a log; empty if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
