"""SIGKILL, and loss of power, at every single file-system operation of a save: no torn load, at most one save lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_kill import Killer, killed_at
from checkpoint_toy import Run, differences, everything, folder, steps
from safetensors.torch import load, save
from torch import nn

import camshaft_checkpoint
from camshaft.testing.ranks import RankFailed, run_ranks
from camshaft_checkpoint import files

LIMIT = 400
"""More operations than any save here has."""


def small() -> nn.Module:
    """Few tensors: each is a write, and each write a crash point."""
    torch.manual_seed(5)
    return nn.Linear(3, 5)


def start(path: Path, **options: Any) -> Run:
    return Run(path, model=small(), keep_last=1, **options)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Mapping[str, Any]]:
    """State after each step of a run that is never killed."""
    run = start(tmp_path_factory.mktemp("reference"))
    found = {}
    for step in (1, 2, 3):
        run.train(1)
        found[step] = everything(run.state)
    return found


@pytest.fixture(scope="module")
def one_step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoint of step 1, and what a kill during the save before it could have left."""
    path = tmp_path_factory.mktemp("one_step")
    start(path).train(1)
    for left in ("step_00000009.tmp", "trash-step_00000000"):
        (path / "checkpoints" / left).mkdir()
        (path / "checkpoints" / left / "rank_00000.safetensors").write_bytes(b"left over")
    return path


def next_step(path: Path, **options: Any) -> Callable[[], None]:
    def work() -> None:
        run = start(path, **options)
        assert run.load()
        run.train(1)
        run.plugin.close(run.state, "finished")

    return work


def continue_from(path: Path, reference: Mapping[int, Mapping[str, Any]]) -> int:
    """Load what there is after a kill, compare it, make the next save and compare that."""
    run = start(path)
    assert run.load()
    step = run.state.step
    assert differences(reference[step], everything(run.state)) == []
    run.train(1)
    assert steps(path) == [step + 1]
    assert camshaft_checkpoint.verify(folder(path, step + 1)) == []
    left = {entry.name for entry in (path / "checkpoints").iterdir()}
    assert left == {"latest", f"step_{step + 1:08d}"}
    assert (path / "checkpoints" / "latest").read_text() == f"step_{step + 1:08d}\n"
    return step


@pytest.mark.parametrize(
    ("power_cut", "options"),
    [(False, {}), (True, {}), (True, {"async": True})],
    ids=["kill", "power", "power-async"],
)
def test_every_crash_point_of_a_save(
    tmp_path: Path,
    one_step: Path,
    reference: Mapping[int, Mapping[str, Any]],
    power_cut: bool,
    options: dict[str, Any],
) -> None:
    found = []
    for point in range(1, LIMIT):
        path = Path(shutil.copytree(one_step, tmp_path / str(point)))
        if not killed_at(point, next_step(path, **options), power_cut=power_cut):
            break
        found.append(continue_from(path, reference))
    assert len(found) > 30
    assert found == sorted(found)  # the rename is the one point at which the new checkpoint counts
    assert set(found) == {1, 2}


def test_a_crash_while_a_damaged_checkpoint_is_replaced(
    tmp_path: Path, one_step: Path, reference: Mapping[int, Mapping[str, Any]]
) -> None:
    template = Path(shutil.copytree(one_step, tmp_path / "template"))
    shutil.copytree(folder(template, 1), folder(template, 2))  # a folder of step 2 with contents of step 1: damaged
    found = []
    for point in range(1, LIMIT):
        path = Path(shutil.copytree(template, tmp_path / str(point)))
        if not killed_at(point, next_step(path)):
            break
        found.append(continue_from(path, reference))
    assert len(found) > 30
    assert set(found) == {1, 2}


def test_without_sync_a_power_cut_would_be_fatal(tmp_path: Path, one_step: Path) -> None:
    fatal = 0
    for point in range(1, LIMIT):
        path = Path(shutil.copytree(one_step, tmp_path / str(point)))
        if not killed_at(point, next_step(path), power_cut=True, sync_works=False):
            break
        fatal += all(camshaft_checkpoint.verify(checkpoint) for checkpoint in (folder(path, 1), folder(path, 2)))
    assert fatal >= 3


def naive_save(path: Path, values: Mapping[str, Any]) -> None:
    """What many programs do: overwrite the files of the last checkpoint, one after another."""
    tensors = {name: value for name, value in values.items() if hasattr(value, "dtype")}
    parts = {
        "model.safetensors": save({name: value for name, value in tensors.items() if "/" not in name}),
        "optimizer.safetensors": save({name: value for name, value in tensors.items() if "/" in name}),
        "state.json": json.dumps({name: value for name, value in values.items() if name not in tensors}).encode(),
    }
    for name, data in parts.items():
        with (path / name).open("wb") as stream:
            files.write(stream.fileno(), data[: len(data) // 2])
            files.write(stream.fileno(), data[len(data) // 2 :])
            files.sync(stream.fileno())


def naive_load(path: Path) -> dict[str, Any]:
    tensors = [load((path / name).read_bytes()) for name in ("model.safetensors", "optimizer.safetensors")]
    found: dict[str, Any] = {**tensors[0], **tensors[1], **json.loads((path / "state.json").read_text())}
    return found


def test_the_naive_protocol_fails_under_the_same_kills(
    tmp_path: Path, reference: Mapping[int, Mapping[str, Any]]
) -> None:
    survived, broken = [], []
    for point in range(1, LIMIT):
        path = tmp_path / str(point)
        path.mkdir()
        naive_save(path, reference[1])
        if not killed_at(point, lambda path=path: naive_save(path, reference[2])):  # type: ignore[misc]
            break
        try:
            loaded = naive_load(path)
            whole = any(differences(reference[step], loaded) == [] for step in (1, 2))
        except Exception:
            whole = False
        (survived if whole else broken).append(point)
    assert len(broken) >= 3
    assert len(survived) + len(broken) == 9


def _two(rank: int, world_size: int, path: Path, victim: int, at: int) -> int:
    run = Run(path, rank, world_size, model=small(), keep_last=1)
    run.load()
    if at and rank == victim:
        Killer(pytest.MonkeyPatch(), at)
    run.train(1)
    return run.state.step


@pytest.mark.parametrize(("victim", "points"), [(1, (1, 3, 6)), (0, (2, 7, 12, 17, 22))])
def test_one_of_two_ranks_is_killed_in_a_save(tmp_path: Path, victim: int, points: tuple[int, ...]) -> None:
    left = []
    for at in points:
        path = tmp_path / str(at)
        assert run_ranks(2, _two, path, 0, 0) == [1, 1]
        with pytest.raises(RankFailed, match=f"rank {victim}: died without a report") as caught:
            run_ranks(2, _two, path, victim, at)
        assert "did not end in time" not in str(caught.value)  # the survivor noticed
        after = run_ranks(2, _two, path, 0, 0)
        assert after[0] == after[1]
        assert steps(path) == [after[0]]
        left.append(after[0] - 1)
    assert left == sorted(left)
    assert set(left) == ({1, 2} if victim == 0 else {1})
