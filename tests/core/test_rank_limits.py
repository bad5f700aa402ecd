"""Limits on ranks of tests count the time that a rank could run, and end what hangs on any machine."""

from __future__ import annotations

import os
import time

import pytest

from camshaft.testing import ranks
from camshaft.testing.ranks import RankFailed, run_ranks, waited_s


def sleeps(rank: int, world_size: int, seconds: float) -> int:
    time.sleep(seconds)
    return rank


def test_what_hangs_is_ended_at_the_limit():
    begin = time.monotonic()
    with pytest.raises(RankFailed, match=r"ranks \[0\] did not end in time"):
        run_ranks(1, sleeps, 60.0, timeout_s=0.5)
    assert time.monotonic() - begin < 30


def test_time_without_a_processor_does_not_count(monkeypatch):
    begin = time.monotonic()
    monkeypatch.setattr(ranks, "waited_s", lambda pid: time.monotonic() - begin)
    assert run_ranks(1, sleeps, 1.5, timeout_s=0.5) == [0]


def test_patience_has_an_end(monkeypatch):
    begin = time.monotonic()
    monkeypatch.setattr(ranks, "waited_s", lambda pid: time.monotonic() - begin)
    with pytest.raises(RankFailed, match="did not end in time"):
        run_ranks(1, sleeps, 60.0, timeout_s=0.2)
    assert time.monotonic() - begin >= 0.2 * ranks.PATIENCE


def test_the_wait_of_a_process_that_is_gone_still_counts(monkeypatch):
    told = iter([3.0, 0.0])
    monkeypatch.setattr(ranks, "waited_s", lambda pid: next(told))
    clock = ranks.Clock([1])
    clock._begin -= 4.0
    assert clock.seconds() == pytest.approx(1.0, abs=0.5) == clock.seconds()


def fails_or_takes_long(rank: int, world_size: int) -> None:
    if rank == 0:
        raise ValueError("on purpose")
    time.sleep(1.0)


def test_the_others_may_end_when_one_has_failed():
    with pytest.raises(RankFailed, match="on purpose") as caught:
        run_ranks(2, fails_or_takes_long, timeout_s=60.0)
    assert "did not end in time" not in str(caught.value)


def shares_a_processor(rank: int, world_size: int, core: int) -> float:
    os.sched_setaffinity(0, {core})
    end = time.monotonic() + 0.6
    while time.monotonic() < end:
        pass
    return waited_s(os.getpid())


def test_the_system_tells_who_waited():
    """Three that never rest share one processor."""
    core = min(os.sched_getaffinity(0))
    waits = run_ranks(3, shares_a_processor, core, timeout_s=60.0)
    assert sum(waits) > 0.3, "1.2 s of the 1.8 s that they asked for at the least, had they begun together"
    assert waited_s(2**22 + 1) == 0.0, "a process that there is not"
