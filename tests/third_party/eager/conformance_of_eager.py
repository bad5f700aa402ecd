"""The promises of every Camshaft plugin, and what this schedule is for."""

from __future__ import annotations

import pytest

import camshaft.testing
from camshaft.program import Kind
from camshaft_eager import order, peak


class TestEager(camshaft.testing.Conformance):
    plugin = "pipeline"
    kind = "schedule"
    recipe = {"parallel": {"pipeline_parallel": 2}, "plugins": {"pipeline": {"schedule": "eager_1f1b"}}}


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 1), (2, 6), (4, 3), (4, 12)])
def test_forwards_run_ahead_twice_as_far_as_in_1f1b(ranks, microbatches):
    for rank in range(ranks):
        kinds = [action.kind for action in order(rank, ranks, microbatches, 1)]
        assert (
            kinds.index(Kind.B) == min(2 * (ranks - 1 - rank) + 1, microbatches) == peak(rank, ranks, microbatches, 1)
        )
        assert kinds.count(Kind.F) == kinds.count(Kind.B) == microbatches
