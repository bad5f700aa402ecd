"""A rank of a divided model is killed in the middle of a save: the newest checkpoint is that step or the one before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoint_flat import everything_whole
from checkpoint_grid import Grid, GridRun
from checkpoint_kill import Killer
from checkpoint_toy import Run, differences, entries, steps

from camshaft.testing.ranks import RankFailed, run_ranks

GRID = Grid(4, tp=2, pp=2)


def _next(rank: int, world_size: int, path: Path, victim: int, at: int) -> tuple[int, dict[str, Any]]:
    """One step more, saved; ``victim`` dies at its operation ``at`` on files (0: nobody does)."""
    run = GridRun(path, rank, GRID, seed=9 if (path / "checkpoints").exists() else 0, keep_last=1)
    run.load()
    before = run.state.step, everything_whole(run)
    if at and rank == victim:
        Killer(pytest.MonkeyPatch(), at)
    run.train(1)
    return before


# The last rank has the last stage's second rectangles; it writes one file. The first one commits, too.
@pytest.mark.parametrize(("victim", "points"), [(3, (1, 3, 5)), (0, (2, 8, 13, 17, 22))])
def test_a_kill_leaves_the_step_or_the_one_before(tmp_path: Path, victim: int, points: tuple[int, ...]) -> None:
    straight = Run(tmp_path / "straight")
    whole = {}
    for step in (1, 2):
        straight.step()
        whole[step] = everything_whole(straight)
    left = []
    for at in points:
        path = tmp_path / str(at)
        run_ranks(4, _next, path, 0, 0)
        with pytest.raises(RankFailed, match=f"rank {victim}: died without a report") as caught:
            run_ranks(4, _next, path, victim, at)
        assert "did not end in time" not in str(caught.value)  # the other stage noticed
        after = run_ranks(4, _next, path, 0, 0)
        assert len({step for step, _ in after}) == 1
        step, loaded = after[0]
        assert differences(whole[step], loaded) == []
        assert steps(path) == [step + 1]
        assert entries(path) == ["latest", f"step_{step + 1:08d}"]
        left.append(step)
    assert left == sorted(left)
    assert set(left) == ({1, 2} if victim == 0 else {1})
