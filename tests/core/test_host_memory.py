"""Freed memory of a CPU run: kept where the recipe says so, left to the C library everywhere else."""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Callable

import pytest
import torch

from camshaft import host_memory
from camshaft.recipe import Resolved
from camshaft.testing.ranks import run_ranks
from camshaft.testing.run import record_rank

MIB = 1 << 20
WARM, ROUNDS, PIECES = 5, 6, 12
PAGES = ROUNDS * PIECES * 12 * MIB // 4096
"""Of all pieces of all rounds."""


def faults() -> int:
    """Pages that the kernel handed to this process since it began."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def churn(rank: int, world_size: int, keep: bool) -> tuple[bool, int]:
    """Fill and free twelve pieces of 12 MiB again and again, as steps do; faults of the rounds after the warm ones."""
    ctypes.CDLL(None).mallopt(-3, 128 << 10)  # as at the start of a process: what the parent freed moves the threshold
    kept = keep and host_memory.keep_freed_memory({})
    for turn in range(WARM + ROUNDS):
        if turn == WARM:
            before = faults()
        pieces = [torch.ones(12 * MIB // 4) for _ in range(PIECES)]
        del pieces
    return kept, faults() - before


def test_a_step_gets_the_memory_that_the_one_before_freed() -> None:
    kept, few = run_ranks(1, churn, True)[0]
    _, many = run_ranks(1, churn, False)[0]
    assert kept
    assert many > PAGES * 3 // 4, "the C library keeps it anyway: this module is not needed"
    assert few < PAGES // 50


@pytest.mark.parametrize(
    "environ",
    [
        {"MALLOC_TRIM_THRESHOLD_": "1"},
        {"MALLOC_MMAP_THRESHOLD_": "65536"},
        {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1"},
        {"LD_PRELOAD": "/usr/lib/libjemalloc.so.2"},
    ],
    ids=lambda environ: next(iter(environ)),
)
def test_what_the_user_chose_stays(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def never(which: int, value: int) -> int:
        raise AssertionError("changed")

    monkeypatch.setattr(host_memory, "_mallopt", lambda: never)
    assert not host_memory.keep_freed_memory(environ)


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_mallopt", lambda: None)
    assert not host_memory.keep_freed_memory({})


def recorded(rank: int, world_size: int, resolved: Resolved) -> int:
    """How often a run asked to keep memory."""
    calls: list[int] = []
    pytest.MonkeyPatch().setattr("camshaft.loop.keep_freed_memory", lambda: calls.append(rank) is None)
    record_rank(rank, world_size, resolved)
    return len(calls)


@pytest.mark.parametrize("keep", [True, False])
def test_the_recipe_decides(keep: bool, make_recipe: Callable[..., Resolved]) -> None:
    resolved = make_recipe(
        {"sgd": {"lr": 0.1}}, launch={"device": "cpu", "threads_per_rank": 1, "keep_freed_memory": keep}
    )
    assert run_ranks(1, recorded, resolved) == [int(keep)]
