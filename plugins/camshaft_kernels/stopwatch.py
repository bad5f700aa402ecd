"""How long a call keeps a device: on a GPU without the host's part, and from memory instead of its cache.

On a GPU a call of a few short kernels takes the host longer to launch than the GPU to run, and events around it would
time the host. So work for the GPU is queued before: a buffer larger than its L2 cache is read until the host, whose own
time is measured first, must have queued all of the call. Whether it had is asked of the first event, which must not
have come by then; if it has, more is put before. A call that waits for the GPU itself is timed with its waits.

Reading that buffer also leaves the cache full of what the call does not use; writing it would leave the call to write
it back. A CPU is timed by its clock, with its caches as the run before left them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]

WARM_UP = 2
"""Runs that are not counted: compilation, tables, the allocator's first blocks."""

FLUSH_BYTES = 1 << 28
"""Read at least, and four times the L2 cache: that of an H100 holds 50 MB."""

COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}
COPIES = 20

MOST_MS = 50.0
"""Work that is put before a call at most: one that needs more waits for the GPU itself."""


class Stopwatch:
    """Times calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def cache(self) -> str:
        """The state of the cache that calls are timed in, in words."""
        if self.device.type == "cuda":
            return f"the GPU's time, from memory: {self._buffer.nbytes >> 20} MiB are read before each run"
        return "caches as the run before left them"

    def prepare(self, call: Call) -> Sampler:
        """Run ``call`` until it is warm, and learn what the host takes for it."""
        host_ms = 0.0
        for _ in range(WARM_UP):
            self._wait()
            begin = time.perf_counter()
            call()
            host_ms = (time.perf_counter() - begin) * 1e3
        self._wait()
        return Sampler(self, call, min(2 * host_ms, MOST_MS))

    def copy_rate(self) -> float:
        """Bytes a second of a copy of ``COPY_BYTES``, read and written: what operations bound by memory are held to."""
        source = torch.zeros(COPY_BYTES[self.device.type], dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        sampler = self.prepare(lambda: target.copy_(source))
        return 2 * source.numel() / statistics.median(sampler() for _ in range(COPIES)) * 1e3

    def flush(self) -> None:
        """Keep the GPU busy for a while, and its cache full."""
        torch.sum(self._buffer, 0, out=self._total)

    @cached_property
    def flush_ms(self) -> float:
        """The GPU's time for that: of many together, which need no host."""
        count = 20
        first, last = self.event(), self.event()
        for turn in range(count + 1):
            self.flush()
            if turn == 0:
                first.record()
        last.record()
        self._wait()
        return max(float(first.elapsed_time(last)) / count, 1e-3)

    @cached_property
    def _buffer(self) -> Tensor:
        known = torch.cuda.get_device_properties(self.device)
        bytes_ = max(FLUSH_BYTES, 4 * int(getattr(known, "L2_cache_size", 0)))
        return torch.zeros(bytes_ // 4, dtype=torch.float32, device=self.device)

    @cached_property
    def _total(self) -> Tensor:
        return torch.zeros((), device=self.device)

    def event(self) -> Any:
        """A mark on the GPU's own time."""
        return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Sampler:
    """One call; each use runs it once, and returns milliseconds."""

    def __init__(self, stopwatch: Stopwatch, call: Call, lead_ms: float) -> None:
        self.stopwatch, self.call, self.lead_ms = stopwatch, call, lead_ms
        self.ahead = True
        """Whether more work before the call brings the host ahead. False: it waits for the GPU in the call itself."""

    def __call__(self) -> float:
        if self.stopwatch.device.type != "cuda":
            begin = time.perf_counter()
            self.call()
            return (time.perf_counter() - begin) * 1e3
        found, ahead = self._once(self.lead_ms)
        lead = self.lead_ms
        while self.ahead and not ahead:
            self.ahead, lead = lead < MOST_MS, max(2 * lead, 1.0)
            found, ahead = self._once(lead)
        if ahead:
            self.lead_ms = lead
        return found

    def median(self, seconds: float, least: int) -> float:
        """Of runs for about ``seconds``, of ``least`` at least."""
        found: list[float] = []
        end = time.perf_counter() + seconds
        while len(found) < least or time.perf_counter() < end:
            found.append(self())
        return statistics.median(found)

    def _once(self, lead_ms: float) -> tuple[float, bool]:
        """(Milliseconds, whether the host was ahead)."""
        first, last = self.stopwatch.event(), self.stopwatch.event()
        for _ in range(1 + int(lead_ms / self.stopwatch.flush_ms)):
            self.stopwatch.flush()
        first.record()
        self.call()
        last.record()
        ahead = not first.query()
        last.synchronize()
        return float(first.elapsed_time(last)), ahead
