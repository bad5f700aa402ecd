"""Which checkpoints are kept, and which options make sense."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from checkpoint_toy import Run, entries, files_of, folder, steps

import camshaft_checkpoint
from camshaft.claims import PlanContext
from camshaft.errors import MachineError
from camshaft.host import Host
from camshaft.mesh import MeshShape
from camshaft.recipe.schema import Recipe
from camshaft_checkpoint import Plugin, files, folders


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"keep_last": 1}, [7]),
        ({"keep_last": 3}, [5, 6, 7]),
        ({"keep_last": 2, "keep_every": 3}, [3, 6, 7]),
        ({"keep_last": 1, "keep_every": 2}, [2, 4, 6, 7]),
        ({"keep_last": 1, "every_steps": 3}, [6]),
    ],
)
def test_retention(tmp_path: Path, options: dict[str, Any], expected: list[int]) -> None:
    run = Run(tmp_path, **options)
    run.train(7)
    assert steps(tmp_path) == expected
    assert entries(tmp_path) == ["latest", *(f"step_{step:08d}" for step in expected)]
    assert (tmp_path / "checkpoints" / "latest").read_text() == f"step_{expected[-1]:08d}\n"


def corrupt(checkpoint: Path, how: str) -> None:
    path = checkpoint / "rank_00000.safetensors"
    data = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(data[:-1])
    else:
        data[-1] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_damaged_checkpoints_do_not_push_out_good_ones(tmp_path: Path, how: str) -> None:
    run = Run(tmp_path, keep_last=2)
    run.train(2)
    for step in (3, 4):
        shutil.copytree(folder(tmp_path, 2), folder(tmp_path, step))  # contents of another step: damaged
    corrupt(folder(tmp_path, 2), how)
    resumed = Run(tmp_path, keep_last=2)
    assert resumed.load()
    assert resumed.state.step == 1  # 4, 3 and 2 are damaged
    resumed.state.step = 4
    resumed.train(1)
    assert steps(tmp_path) == [1, 2, 3, 4, 5]  # 5 and 1 are the two good ones
    resumed.train(1)
    assert steps(tmp_path) == [5, 6]


def test_damage_without_notice_leaves_a_good_one(tmp_path: Path) -> None:
    run = Run(tmp_path, keep_last=1)
    run.train(1)
    corrupt(folder(tmp_path, 1), "flipped")
    run.train(1)
    assert steps(tmp_path) == [2]
    assert camshaft_checkpoint.verify(folder(tmp_path, 2)) == []


def test_nothing_is_deleted_when_the_new_one_is_short_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, keep_last=1)
    run.train(1)
    close = files.NewFile.close

    def lose_a_byte(self: files.NewFile) -> files.Record:
        record = close(self)
        os.truncate(self.path, record.size - 1)
        return record

    monkeypatch.setattr(files.NewFile, "close", lose_a_byte)
    with pytest.raises(MachineError, match=r"rank_00000\.safetensors: has \d+ bytes, and \d+ were written"):
        run.train(1)
    assert entries(tmp_path) == ["latest", "step_00000001"]
    assert camshaft_checkpoint.verify(folder(tmp_path, 1)) == []


def test_trouble_while_cleaning_up_does_not_fail_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    run = Run(tmp_path, keep_last=1)
    run.train(1)
    with monkeypatch.context() as patch:
        patch.setattr(files, "unlink", refuse)
        run.train(1)
    assert steps(tmp_path) == [2]
    assert "is complete, but cleaning up" in caplog.text
    assert "trash-step_00000001" in entries(tmp_path)
    run.train(1)
    assert entries(tmp_path) == ["latest", "step_00000003"]


def test_removal_does_not_follow_links(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "precious").write_text("x")
    trash = tmp_path / "checkpoints" / "trash-step_00000001"
    trash.mkdir(parents=True)
    (trash / "link").symlink_to(kept)
    (tmp_path / "checkpoints" / "step_00000001.tmp").symlink_to(kept)
    folders.sweep(tmp_path / "checkpoints")
    assert entries(tmp_path) == []
    assert (kept / "precious").read_text() == "x"


def test_a_good_checkpoint_of_the_same_step_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    Run(tmp_path).train(2)
    before = {entry.name: entry.stat().st_mtime_ns for entry in files_of(folder(tmp_path, 2))}
    resumed = Run(tmp_path)
    assert resumed.load()
    resumed.plugin._bound().saved_step = None  # as if this process had never heard of it
    resumed.plugin.save(resumed.state)
    assert {entry.name: entry.stat().st_mtime_ns for entry in files_of(folder(tmp_path, 2))} == before
    assert "exists and is intact" in caplog.text


def plan(training: dict[str, Any], **options: Any) -> list[str]:
    recipe = Recipe.model_validate(
        {
            "schema_version": 1,
            "name": "x",
            "batch": {"micro_batch_size": 1, "global_batch_size": 1},
            "training": training,
        }
    )
    plugin = Plugin(Plugin.Options.model_validate(options))
    plugin.name = "checkpoint"
    context = PlanContext(recipe, MeshShape.of(recipe.parallel, 1), ("checkpoint",), "cpu")
    found = plugin.plan(context)
    assert found.claims == ()
    return [str(problem) for problem in found.problems]


def test_options_that_contradict_each_other_are_problems(tmp_path: Path) -> None:
    steps_100 = {"max_steps": 100}
    assert plan(steps_100, every_steps=10, keep_every=50, **{"async": True}) == []
    assert plan(steps_100) == []
    assert plan(steps_100, every_steps=10, resume=str(tmp_path)) == []
    cases = [
        ({"save_at_end": False}, "plugins.checkpoint.every_steps: nothing would be saved"),
        ({"every_steps": 200, "save_at_end": False}, "training ends after 100"),
        ({"async": True}, "plugins.checkpoint.async: async concerns periodic checkpoints"),
        ({"every_steps": 10, "keep_every": 25}, "plugins.checkpoint.keep_every: keep_every is 25"),
        ({"keep_every": 25}, "must be a multiple"),
        ({"every_steps": 10, "resume": str(tmp_path / "no")}, "plugins.checkpoint.resume: there is no folder"),
    ]
    for options, expected in cases:
        problems = plan(steps_100, **options)
        assert len(problems) == 1, options
        assert expected in problems[0]
        assert "Fix: " in problems[0]


@pytest.mark.parametrize(
    "options", [{"keep_last": 0}, {"every_steps": 0}, {"on_error": "ignore"}, {"resume": ""}, {"keep": 1}]
)
def test_options_that_are_wrong_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Plugin.Options.model_validate(options)


def test_the_host_accepts_the_plugin_as_owner_of_both_slots() -> None:
    owners = Host({"checkpoint": Plugin(Plugin.Options(every_steps=1))}).owners()
    assert {slot for slot, names in owners.items() if names} == {"save", "load"}
