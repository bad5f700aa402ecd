"""Disks that are full or not writable, and writing in the background."""

from __future__ import annotations

import errno
import os
import resource
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoint_toy import Gate, Run, Toy, differences, entries, everything, files_of, folder, steps

import camshaft_checkpoint
from camshaft.errors import CheckpointError, MachineError
from camshaft.testing.ranks import run_ranks
from camshaft_checkpoint import Plugin, files


def limit_file_size(size: int) -> None:
    """As a quota does: writing beyond ``size`` bytes of one file fails (``RLIM_INFINITY`` lifts it)."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def _fail_at_sizes(rank: int, world_size: int, path: Path, sizes: list[int]) -> list[str]:
    run = Run(path)
    run.train(1)
    run.step()
    messages = []
    for size in sizes:
        limit_file_size(size)
        try:
            run.plugin.post_step(run.state)
            messages.append("saved")
        except MachineError as error:
            messages.append(str(error))
        limit_file_size(resource.RLIM_INFINITY)
        assert entries(path) == ["latest", "step_00000001"]
        assert camshaft_checkpoint.verify(folder(path, 1)) == []
    run.plugin.post_step(run.state)
    assert entries(path) == ["latest", "step_00000001", "step_00000002"]
    return messages


def test_a_full_disk_at_50_offsets(tmp_path: Path) -> None:
    probe = Run(tmp_path / "probe")
    probe.train(1)
    largest = max(entry.stat().st_size for entry in files_of(folder(tmp_path / "probe", 1)))
    sizes = [largest * number // 50 for number in range(50)]
    (messages,) = run_ranks(1, _fail_at_sizes, tmp_path / "run", sizes)
    assert len(messages) == 50
    for message in messages:
        assert str(tmp_path / "run" / "checkpoints" / "step_00000002.tmp") in message
        assert "File too large" in message
        assert " needed, " in message
        assert " free)" in message


def _one_rank_fails(rank: int, world_size: int, path: Path, on_error: str, async_save: bool) -> Any:
    run = Run(path, rank, world_size, on_error=on_error, async_save=async_save)
    run.train(1)
    run.plugin._bound().wait()
    if rank == 1:
        limit_file_size(100)
    message = ""
    try:
        run.train(1)
        run.plugin._bound().wait()
    except MachineError as error:
        message = f"{type(error).__name__}: {error}"
    limit_file_size(resource.RLIM_INFINITY)
    dist.barrier()  # rank 0 has removed what was unfinished
    during = entries(path)
    run.train(1)
    run.plugin.close(run.state, "finished")
    return message, during, entries(path)


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
def test_all_ranks_agree_when_one_cannot_write(tmp_path: Path, async_save: bool) -> None:
    for message, during, after in run_ranks(2, _one_rank_fails, tmp_path, "stop", async_save):
        assert message.startswith("MachineError: ")
        assert "step_00000002.tmp: File too large" in message
        assert during == ["latest", "step_00000001"]
        assert after == ["latest", "step_00000001", "step_00000003"]


def test_training_can_go_on_without_a_checkpoint(tmp_path: Path) -> None:
    for message, during, after in run_ranks(2, _one_rank_fails, tmp_path, "continue", False):
        assert message == ""
        assert during == ["latest", "step_00000001"]
        assert after == ["latest", "step_00000001", "step_00000003"]


def test_a_save_that_the_core_asks_for_raises_also_with_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, every_steps=None, on_error="continue")
    run.train(1)
    monkeypatch.setattr(files, "free_bytes", lambda path: 10)
    with pytest.raises(MachineError, match=r"step_00000001\.tmp: not enough space \(.* needed, 10 B free\)"):
        run.plugin.save(run.state)
    assert entries(tmp_path) == []


def test_a_folder_that_cannot_be_written_to_is_found_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file is in the way")
    with pytest.raises(MachineError, match=r"cannot write the checkpoint .*checkpoints"):
        Run(tmp_path).load()


def test_a_read_only_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    run = Run(tmp_path)
    run.train(1)
    run.step()
    monkeypatch.setattr(files, "make_directory", refuse)
    with pytest.raises(MachineError, match=r"Read-only file system.*Older checkpoints are untouched"):
        run.plugin.post_step(run.state)
    assert camshaft_checkpoint.verify(folder(tmp_path, 1)) == []


def spoil(run: Run, mine: dict[str, Any]) -> None:
    with torch.no_grad():
        for tensor in (*run.model.parameters(), *run.model.buffers()):
            tensor.fill_(1)
        for entries in run.state.optimizer.state.values():
            for value in entries.values():
                value.fill_(77)
    for group in run.state.optimizer.param_groups:
        group["weight_decay"] = 5.0
    mine["list"].append("later")
    run.state.step, run.state.consumed_samples, run.state.consumed_tokens = 99, 98, 97


def test_later_steps_cannot_touch_a_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, async_save=True, every_steps=2)
    mine: dict[str, Any] = {"list": [1]}
    run.state.components = [("mine", lambda: mine, dict)]
    run.train(3)  # the buffers of the save after step 2 are used again
    run.plugin._bound().wait()
    gate = Gate(monkeypatch)
    run.step()
    expected = everything(run.state)
    run.plugin.post_step(run.state)
    assert gate.reached.wait(20)  # it is being written
    assert steps(tmp_path) == [2]  # and post_step did not wait for that
    spoil(run, mine)
    gate.opened.set()
    run.plugin.close(run.state, "finished")

    got: list[Any] = []
    loaded = Run(tmp_path, model=Toy(seed=9))
    loaded.state.components = [("mine", dict, got.append)]
    assert loaded.load()
    assert differences(expected, everything(loaded.state)) == []
    assert got == [{"list": [1]}]


def test_without_the_copy_later_steps_would_be_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above: it must be able to fail."""
    from camshaft_checkpoint.planning import SavePlanner

    monkeypatch.setattr(SavePlanner, "snapshot", lambda self, buffers: None)
    run = Run(tmp_path, async_save=True)
    gate = Gate(monkeypatch)
    run.step()
    expected = everything(run.state)
    run.plugin.post_step(run.state)
    assert gate.reached.wait(20)
    spoil(run, {"list": []})
    gate.opened.set()
    run.plugin.close(run.state, "finished")
    loaded = Run(tmp_path, model=Toy(seed=9))
    assert loaded.load()
    assert len(differences(expected, everything(loaded.state))) > 10


def test_the_next_save_waits_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, async_save=True)
    gate = Gate(monkeypatch)
    run.train(1)
    assert gate.reached.wait(20)
    threading.Timer(0.2, gate.opened.set).start()
    run.train(2)
    run.plugin.save(run.state)  # durable when it returns
    assert steps(tmp_path) == [2, 3]
    assert all(camshaft_checkpoint.verify(folder(tmp_path, step)) == [] for step in (2, 3))


def fail_writing(patch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, data: files.Data) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr(files, "write", refuse)


def test_an_error_in_the_background_surfaces_at_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, async_save=True, every_steps=2)
    run.train(1)
    fail_writing(monkeypatch)
    run.train(1)
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join(20)
    with pytest.raises(MachineError, match="No space left on device"):
        run.train(1)
    run.plugin.close(run.state, "finished")  # it is raised once


@pytest.mark.parametrize(("status", "raises"), [("finished", True), ("interrupted", True), ("failed", False)])
def test_an_error_in_the_background_surfaces_at_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, status: str, raises: bool
) -> None:
    run = Run(tmp_path, async_save=True)
    fail_writing(monkeypatch)
    run.train(1)
    if raises:
        with pytest.raises(MachineError, match="No space left on device"):
            run.plugin.close(run.state, status)
    else:
        run.plugin.close(run.state, status)
        assert "No space left on device" in caplog.text


def test_a_failing_run_does_not_wait_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, async_save=True)
    gate = Gate(monkeypatch)
    run.train(1)
    assert gate.reached.wait(20)
    monkeypatch.setattr(camshaft_checkpoint, "_FAILED_WAIT_S", 0.1)
    run.plugin.close(run.state, "failed")
    assert steps(tmp_path) == []
    gate.opened.set()
    run.plugin.close(run.state, "finished")
    assert steps(tmp_path) == [1]


def test_close_without_bind_is_fine(tmp_path: Path) -> None:
    run = Run(tmp_path)
    Plugin(Plugin.Options(every_steps=1)).close(run.state, "failed")


def _one_rank_cannot_collect(rank: int, world_size: int, path: Path) -> str:
    run = Run(path, rank, world_size)
    if rank == 1:
        run.state.components = [("odd", lambda: {"a": {1, 2}}, dict)]
    try:
        run.train(1)
    except CheckpointError as error:
        return str(error)
    return "saved"


def test_an_error_of_one_rank_is_an_error_of_all(tmp_path: Path) -> None:
    first, second = run_ranks(2, _one_rank_cannot_collect, tmp_path)
    assert first.startswith("rank 1: ")
    assert "not JSON" in first
    assert "not JSON" in second
    assert not (tmp_path / "checkpoints").exists()
