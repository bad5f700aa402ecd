"""What times kernels: on a GPU that is only simulated here, the host's time stays out, whatever it takes."""

import math

import pytest
import torch

from camshaft_kernels import stopwatch
from camshaft_kernels.stopwatch import MOST_MS, Sampler, Stopwatch


class Machine:
    """A host and a GPU with clocks of their own, in milliseconds: work starts when it is queued and the GPU is free."""

    def __init__(self):
        self.host, self.free = 0.0, 0.0

    def launch(self, host, work):
        self.host += host
        self.free = max(self.free, self.host) + work

    def wait(self, device=None):
        self.host = max(self.host, self.free)


class Event:
    def __init__(self, machine):
        self.machine = machine

    def record(self):
        self.time = max(self.machine.free, self.machine.host)

    def query(self):
        return self.machine.host >= self.time

    def synchronize(self):
        self.machine.wait()

    def elapsed_time(self, last):
        return last.time - self.time


class Simulated(Stopwatch):
    """A stopwatch on that machine, whose cache takes 0.1 ms to fill."""

    def __init__(self, machine):
        super().__init__(torch.device("cuda"))
        self.machine, self.flushes = machine, 0

    def flush(self):
        self.flushes += 1
        self.machine.launch(0.005, 0.1)

    def event(self):
        return Event(self.machine)


@pytest.fixture
def machine(monkeypatch):
    made = Machine()
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: made.host / 1e3)
    monkeypatch.setattr(torch.cuda, "synchronize", made.wait)
    return made


@pytest.mark.parametrize("host", [0.01, 0.2, 4.0])
def test_gaps_between_launches_are_not_timed(machine, host):
    def call():
        for _ in range(3):
            machine.launch(host / 3, 0.02)

    watch = Simulated(machine)
    sampler = watch.prepare(call)
    assert math.isclose(watch.flush_ms, 0.1, rel_tol=1e-6)
    assert math.isclose(sampler.median(0.01, 5), 0.06, rel_tol=1e-6) and sampler.ahead
    machine.wait()
    first, last = Event(machine), Event(machine)
    first.record(), call(), last.record()
    assert first.elapsed_time(last) >= host, "what events alone would have told"


def test_a_call_that_the_host_takes_longer_for_than_before_gets_more_work_put_before(machine):
    watch, slow = Simulated(machine), []
    sampler = watch.prepare(lambda: machine.launch(8.0 if slow else 0.05, 0.02))
    assert math.isclose(sampler(), 0.02, rel_tol=1e-6)
    slow.append(True)
    assert math.isclose(sampler(), 0.02, rel_tol=1e-6)
    assert sampler.ahead and sampler.lead_ms >= 8
    before = watch.flushes
    assert math.isclose(sampler(), 0.02, rel_tol=1e-6)
    assert watch.flushes - before == 1 + int(sampler.lead_ms / watch.flush_ms), "at once, the next time"


def test_a_call_that_waits_for_the_gpu_is_timed_with_its_waits_and_says_so(machine):
    def call():
        machine.launch(0.05, 0.02)
        machine.wait()
        machine.launch(0.3, 0.02)

    sampler = Simulated(machine).prepare(call)
    assert math.isclose(sampler(), 0.34, rel_tol=1e-6)
    assert not sampler.ahead
    assert math.isclose(sampler(), 0.34, rel_tol=1e-6) and sampler.lead_ms < MOST_MS / 10


def test_a_cpu_is_timed_by_its_clock_after_two_runs():
    calls = []
    watch = Stopwatch(torch.device("cpu"))
    sampler = watch.prepare(lambda: calls.append(1))
    assert len(calls) == 2 and isinstance(sampler, Sampler)
    assert sampler.median(0.0, 5) >= 0 and len(calls) == 7
    assert 1e7 < watch.copy_rate() < 1e13
    assert watch.cache == "caches as the run before left them"
