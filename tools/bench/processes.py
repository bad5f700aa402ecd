"""Forked ranks that live as long as the benchmark and work only when they are told to.

Each contestant has processes of its own, so that what one library does to a process (hooks, patches, groups, caches of
the allocator) touches no other; those that wait block in a read and use no core.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from tools.bench.peers import Contestant, Job

Build = Callable[[Job], Contestant]
TIMEOUT_S = 600.0


class Block(NamedTuple):
    """What one block of steps showed, of the slowest rank."""

    seconds: float
    """A step."""
    loss: float
    """Of the last step, per token, mean over ranks."""
    idle_cpu_s: float
    """Processor time that the ranks used since their block before: near zero, or they disturb the others."""


class Ranks:
    """The ranks of one contestant.

    Raises:
        RuntimeError: from every method, when a rank raised, died or did not answer; holds its report.
    """

    def __init__(self, name: str, jobs: list[Job], build: Build, group: bool, fresh: bool = False) -> None:
        self.name = name
        # What was forked from a process that has asked CUDA anything cannot use a GPU.
        context: Any = multiprocessing.get_context("spawn" if fresh else "fork")
        self._folder = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self._processes = []
        for job in jobs:
            own, other = context.Pipe()
            inherited = [] if fresh else [*self._pipes, own]
            arguments = (other, inherited, Path(self._folder.name) / "store", job, build, group)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            other.close()
            self._pipes.append(own)
            self._processes.append(process)

    def ask(self, order: str, count: int = 0) -> list[Any]:
        """Give all ranks an order and wait for all answers."""
        for pipe in self._pipes:
            pipe.send((order, count))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(TIMEOUT_S):
                raise RuntimeError(f"{self.name}, rank {rank}: no answer to '{order}' in {TIMEOUT_S:.0f} s")
            try:
                fine, value = pipe.recv()
            except EOFError:
                fine, value = False, "died without a report"
            if not fine:
                raise RuntimeError(f"{self.name}, rank {rank}: {value}")
            answers.append(value)
        return answers

    def steps(self, count: int) -> Block:
        """One step to warm up, then ``count`` timed ones."""
        seconds, losses, idle = zip(*self.ask("steps", count), strict=True)
        return Block(max(seconds), sum(losses) / len(losses), max(idle))

    def close(self) -> None:
        """End the processes; those that do not end by themselves are killed."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()


def _serve(pipe: Connection, others: list[Connection], store: Path, job: Job, build: Build, group: bool) -> None:
    for other in others:
        other.close()  # else the end of the parent's side would never be seen here
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        if group:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=job.rank, world_size=job.world_size)
            dist.barrier()
        server = _Server(job, build)
        while True:
            order, count = pipe.recv()
            pipe.send((True, getattr(server, order)(count)))
    except EOFError:
        status = 0
    except BaseException:
        status = 1
        pipe.send((False, traceback.format_exc()))
    # Not sys.exit: exit handlers are the parent's. Peers may be gone, so no group is torn down.
    os._exit(status)


class _Server:
    """One rank: each method is an order."""

    def __init__(self, job: Job, build: Build) -> None:
        self._job, self._build = job, build
        self._contestant: Contestant | None = None
        self._before = 0
        self._cpu = 0.0

    def build(self, _: int) -> None:
        """Make the contestant."""
        self._before = _reset_peak()
        self._contestant = self._build(self._job)
        self._cpu = time.process_time()

    def steps(self, count: int) -> tuple[float, float, float]:
        """Seconds a step from a barrier to the slowest rank's end, last loss, processor time used while waiting.

        The step before the clock starts warms caches up, and leaves to the first timed one what a step leaves to its
        successor (a gather under way); so the last timed one, whose successor comes later, gains nothing by it.
        """
        assert self._contestant is not None
        idle = time.process_time() - self._cpu
        self._contestant.steps(1)
        _meet()
        began = time.perf_counter()
        loss = self._contestant.steps(count)
        _meet()
        seconds = (time.perf_counter() - began) / count
        self._cpu = time.process_time()
        return seconds, loss, idle

    def peak(self, _: int) -> int:
        """Bytes of tensors on the device at the fullest moment so far, as the contestant tells."""
        peak: Callable[[], int] = getattr(self._contestant, "peak")  # noqa: B009
        return peak()

    def resident(self, _: int) -> int:
        """Bytes by which this process grew at its largest since before the contestant was built."""
        return _status("VmHWM") - self._before

    def tensors(self, count: int) -> int:
        """Largest number of bytes in torch's tensors on the CPU, from before the model exists to ``count`` steps."""
        kinds = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=kinds, profile_memory=True, acc_events=True) as profile:
            self.build(0)
            assert self._contestant is not None
            self._contestant.steps(count)
        return largest(profile)


def largest(profile: torch.profiler.profile) -> int:
    """Peak of the bytes that torch had allocated on the CPU, of what it allocated while profiled."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profile.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    return max(int(event["args"]["Total Allocated"]) for event in events if event.get("name") == "[memory]")


def _meet() -> None:
    if dist.is_initialized():
        dist.barrier()


def _reset_peak() -> int:
    """Let Linux forget this process's largest size; returns the present one in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


@contextmanager
def alive(name: str, jobs: list[Job], build: Build, group: bool, fresh: bool = False) -> Iterator[Ranks]:
    """Ranks that end with the block. ``fresh``: they start as new processes, with nothing of this one."""
    ranks = Ranks(name, jobs, build, group, fresh)
    try:
        yield ranks
    finally:
        ranks.close()
