"""Ranks for tests: forked from a process that has imported torch already, which takes 0.1 s instead of seconds."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

_IMPORTED_BY_OPTIMIZERS = "torch._dynamo"
"""Torch imports it, and half a second of modules with it, in the first step; here, each rank would do so anew."""


class RankFailed(AssertionError):
    """A rank raised, died or did not end in time; holds every rank's report."""


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 60.0) -> list[Any]:
    """Run ``function(rank, world_size, *arguments)`` on forked ranks of one gloo group; return the results by rank.

    With one rank no process group is made. Results travel pickled. The caller's threads do not exist in the ranks, and
    the caller must not have a process group of its own.

    Raises:
        RankFailed: a rank raised, died or ran longer than ``timeout_s``.
    """
    importlib.import_module(_IMPORTED_BY_OPTIMIZERS)
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_rank, args=(rank, world_size, folder, sender, function, arguments))
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            return _collect(pipes, time.monotonic() + timeout_s)
        finally:
            for process in processes:
                process.join(timeout=2)
                if process.is_alive():
                    process.kill()
                    process.join()


def _collect(pipes: list[Connection], deadline: float) -> list[Any]:
    results: list[Any] = [None] * len(pipes)
    faults: list[str] = []
    waiting = dict(enumerate(pipes))
    while waiting:
        ready = wait(list(waiting.values()), max(deadline - time.monotonic(), 0))
        if not ready:
            faults.append(f"ranks {sorted(waiting)} did not end in time")
            break
        for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
            try:
                fine, value = pickle.loads(waiting.pop(rank).recv_bytes())  # noqa: S301  made by our own child
            except (EOFError, OSError):  # the second: in the middle of a report
                fine, value = False, "died without a report"
            if fine:
                results[rank] = value
            else:
                faults.append(f"rank {rank}: {value}")
                deadline = min(deadline, time.monotonic() + 5)
    if faults:
        raise RankFailed("\n".join(faults))
    return results


def _rank(
    rank: int,
    world_size: int,
    folder: str,
    sender: Connection,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

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
                timeout=timedelta(seconds=30),
            )
            dist.barrier()  # a rank with nothing to say would be gone while its peers still connect to it
        report = pickle.dumps((True, function(rank, world_size, *arguments)))
    except BaseException:
        status = 1
        report = pickle.dumps((False, traceback.format_exc()))
    sender.send_bytes(report)
    sender.close()
    # Not sys.exit: the fork has inherited pytest's and torch's exit handlers, which belong to the parent.
    os._exit(status)
