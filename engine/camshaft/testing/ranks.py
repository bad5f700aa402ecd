"""Ranks for tests: forked from a process that has imported torch already, which takes 0.1 s instead of seconds."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# Asking whether there is a GPU starts CUDA else, and in what is forked from a process that has, torch's own optimizers
# fail, which ask CUDA something in every step. Ranks of tests run on the CPU, also beside a GPU.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

FORKED_WITH = ["torch._dynamo"]
"""Modules that ranks are forked with, for each would import them anew: torch itself imports that one in the first step,
and half a second of modules with it. A project adds those of its own that importing does not tie to a process.
"""


PATIENCE = 5.0
"""A limit's multiple at which it ends on any machine, however long ranks waited for a processor."""
GRACE_S = 5.0
"""How long the other ranks may go on when one has failed."""


class RankFailed(AssertionError):
    """A rank raised, died or did not end in time; holds every rank's report."""


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 60.0) -> list[Any]:
    """Run ``function(rank, world_size, *arguments)`` on forked ranks of one gloo group; return the results by rank.

    With one rank no process group is made. Results travel pickled; what several ranks report alike is one object here.
    The caller's threads do not exist in the ranks, and the caller must not have a process group of its own. Of a busy
    machine, what a rank waits for a processor does not count as time that it took.

    Raises:
        RankFailed: a rank raised, died or ran longer than ``timeout_s``.
    """
    for name in FORKED_WITH:
        importlib.import_module(name)
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world_size):
            here, there = context.Pipe()
            given = (rank, world_size, folder, timeout_s, there, function, arguments)
            process = context.Process(target=_rank, args=given)
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        try:
            return _collect(pipes, Clock([process.pid or 0 for process in processes]), timeout_s)
        finally:
            for process in processes:
                process.join(timeout=2)
                if process.is_alive():
                    process.kill()
                    process.join()


class Clock:
    """Seconds since it was made, without those in which one of the processes was ready to run and none was free for it.

    On a system that does not tell that, all seconds count.
    """

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids, self._begin, self._waited = pids, time.monotonic(), 0.0

    def seconds(self) -> float:
        """So far; a share of 1 / ``PATIENCE`` of what has passed at least."""
        passed = time.monotonic() - self._begin
        self._waited = max([self._waited, *map(waited_s, self._pids)])
        return max(passed - self._waited, passed / PATIENCE)


def waited_s(pid: int) -> float:
    """How long the thread of process ``pid`` that waited most was ready without a processor, in seconds (Linux,
    Documentation/scheduler/sched-stats.rst); 0 where that is not known.
    """
    found = [0]
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, ValueError, IndexError):  # it may end while it is looked at
            found.append(int(path.read_text(encoding="ascii").split()[1]))
    return max(found) / 1e9


def _collect(pipes: list[Connection], clock: Clock, limit: float) -> list[Any]:
    results: list[Any] = [None] * len(pipes)
    faults: list[str] = []
    known: dict[bytes, tuple[bool, Any]] = {}
    waiting = dict(enumerate(pipes))
    while waiting:
        left = limit - clock.seconds()
        ready = wait(list(waiting.values()), min(max(left, 0.0), 1.0))
        if not ready and left <= 0:
            faults.append(f"ranks {sorted(waiting)} did not end in time")
            break
        for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
            try:
                fine, value = _receive(waiting.pop(rank), known)
            except (EOFError, OSError):  # the second: in the middle of a report
                fine, value = False, "died without a report"
            if fine:
                results[rank] = value
            else:
                faults.append(f"rank {rank}: {value}")
                limit = min(limit, clock.seconds() + GRACE_S)
    if faults:
        raise RankFailed("\n".join(faults))
    return results


def _receive(pipe: Connection, known: dict[bytes, tuple[bool, Any]]) -> tuple[bool, Any]:
    """A rank's report; one that another has made in the same words is neither sent nor read again."""
    digest = pipe.recv_bytes()
    pipe.send(digest not in known)
    if digest not in known:
        known[digest] = pickle.loads(pipe.recv_bytes())  # noqa: S301  made by our own child
    return known[digest]


def _report(pipe: Connection, report: bytes) -> None:
    pipe.send_bytes(hashlib.sha256(report).digest())
    if pipe.recv():
        pipe.send_bytes(report)
    pipe.close()


def _rank(
    rank: int,
    world_size: int,
    folder: str,
    timeout_s: float,
    pipe: Connection,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    from camshaft.testing import reports

    gc.freeze()  # else each collection of garbage writes to all that the parent has, and so copies those pages
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    status = 0
    try:
        if world_size > 1:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{Path(folder) / 'store'}",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=max(timeout_s, 30)),  # the caller ends what hangs
            )
            dist.barrier()  # a rank with nothing to say would be gone while its peers still connect to it
        report = reports.dumps((True, function(rank, world_size, *arguments)))
    except BaseException:
        status = 1
        report = pickle.dumps((False, traceback.format_exc()))
    _report(pipe, report)
    # Not sys.exit: the fork has inherited pytest's and torch's exit handlers, which belong to the parent.
    os._exit(status)
