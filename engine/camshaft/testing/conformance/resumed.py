"""Saved in the middle, loaded, and trained on: on the same ranks in every bit, on others within the bounds."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from camshaft.testing.compare import assert_bit_equal, assert_within, compare
from camshaft.testing.conformance.runs import Ran, trained
from camshaft.testing.conformance.trial import STEPS
from camshaft.testing.ranks import run_ranks

if TYPE_CHECKING:
    from camshaft.recipe import Resolved
    from camshaft.testing.conformance import Conformance
    from camshaft.testing.conformance.trial import Trial

HALF = STEPS // 2
SAVING = {"checkpoint": {"every_steps": HALF, "keep_last": 2}}


def check_resume(case: Conformance, trial: Trial) -> None:
    """Three runs: undisturbed, stopped and continued on as many ranks, continued on another number of ranks."""
    sizes = case.sizes()
    size = min((each for each in sizes if each > 1), default=sizes[0])
    resolved = _recipe(trial, size, "undisturbed")
    undisturbed = _run(resolved, size)
    first = _run(_recipe(trial, size, "stopped"), size, HALF)
    assert [record.step for record in first[0].records] == [*range(1, HALF + 1)]
    others = [each for each in sizes if each != size][:1]
    for other in others:
        shutil.copytree(trial.folder / "stopped", trial.folder / f"stopped{other}")
    second = _run(_recipe(trial, size, "stopped"), size)
    assert [record.step for record in second[0].records] == [*range(HALF + 1, STEPS + 1)], "it did not go on"
    for rank, (again, wanted) in enumerate(zip(second, undisturbed, strict=True)):
        assert_bit_equal(again.records, wanted.records[HALF:])
        assert again.kept == wanted.kept, f"what plugins keep differs from that of an undisturbed run, on rank {rank}"
    case.check_parity(trial, resolved, [ran.records for ran in undisturbed])
    for other in others:
        resolved = _recipe(trial, other, f"stopped{other}")
        third = _run(resolved, other)
        assert_within(compare(third[0].records, case.reference(trial, resolved)[HALF:]), case.limits)


def _recipe(trial: Trial, size: int, run: str) -> Resolved:
    plugins = {} if "checkpoint" in trial.fragment["plugins"] else SAVING
    return trial.resolve(size, run=run, plugins=plugins)


def _run(resolved: Resolved, size: int, last: int | None = None) -> list[Ran]:
    return run_ranks(size, trained, resolved, last, timeout_s=120)
