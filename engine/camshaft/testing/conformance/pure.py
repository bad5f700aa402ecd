"""A plan follows from the recipe and the number of ranks, and from nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from camshaft.testing.plans import planned

if TYPE_CHECKING:
    from camshaft.testing.conformance.trial import Trial


def check_plan(trial: Trial, sizes: Sequence[int]) -> None:
    """Ask in two processes, for each number of ranks, as each of them and twice as one.

    Raises:
        AssertionError: answers differ, or asking imports torch, writes or changes something; or the plan is refused.
    """
    path, most = trial.resolve(max(sizes)).path, max(sizes)
    last = str(most - 1)
    one = planned(path, sizes, trial.folder / "one", RANK="0", LOCAL_RANK="0", PYTHONHASHSEED="1")
    two = planned(path, sizes[::-1], trial.folder / "two", RANK=last, LOCAL_RANK=last, PYTHONHASHSEED="2")
    for found in (one, two):
        assert found["imported"] == [], "plan must import neither torch nor what needs it"
        assert found["clean"], "plan must write no file and change no variable of the environment"
        for first, *others in found["plans"].values():
            assert first == others[-1], "asked twice, two answers"
            assert all(first == each for each in others), "ranks plan differently"
    assert one["plans"] == two["plans"], "ranks plan differently"
    status, *said = one["plans"][str(most)][0]
    assert status == "0", f"camshaft plan refuses it: {said}"
