"""Launchers' command lines and environment."""

import fcntl
import os
import socket
import sys
from pathlib import Path

import pytest

from camshaft.cli.launch import commands
from camshaft.cli.launch.commands import Target, child_environment, command_line, equivalent, extensions_folder
from camshaft.errors import MachineError

TARGET = Target("camshaft", ("train", "my recipe.yaml", "a.b=1"))


def line(launcher, environ=None, processes=2):
    return command_line(launcher, processes, TARGET, job=Path("/run/job-1"), port=4711, environ=environ or {})


def test_deepspeed():
    words = line("deepspeed")
    assert Path(words[0]).name == "deepspeed" and Path(words[0]).parent == Path(sys.executable).parent
    assert words[1:] == [
        *["--num_gpus", "2", "--no_local_rank", "--master_port", "4711", "--module", "camshaft", "train"],
        "my recipe.yaml",
        "a.b=1",
    ]


def test_torchrun_meets_in_a_private_file():
    words = line("torchrun")
    assert Path(words[0]).name == "torchrun" and "--nproc-per-node=2" in words
    assert "--rdzv-conf=store_type=file" in words and "--rdzv-endpoint=/run/job-1/agents" in words
    assert words[-5:] == ["-m", "camshaft", "train", "my recipe.yaml", "a.b=1"]


def test_the_equivalent_line_can_be_pasted():
    assert equivalent("deepspeed", 2, TARGET) == (
        "deepspeed --num_gpus 2 --no_local_rank --module camshaft train 'my recipe.yaml' a.b=1"
    )
    assert equivalent("torchrun", 4, TARGET) == "torchrun --nproc-per-node 4 -m camshaft train 'my recipe.yaml' a.b=1"


def test_deepspeed_keeps_the_users_choice_of_gpus():
    words = line("deepspeed", {"CUDA_VISIBLE_DEVICES": "2,3, 5"})
    assert words[1:3] == ["--include", "localhost:2,3"] and "--num_gpus" not in words
    assert "--num_gpus" in line("deepspeed", {"CUDA_VISIBLE_DEVICES": "2,3", "DS_ACCELERATOR": "cpu"})
    with pytest.raises(MachineError, match=r"launch\.launcher=torchrun"):
        line("deepspeed", {"CUDA_VISIBLE_DEVICES": "GPU-8f3,GPU-aa1"})
    assert "--nproc-per-node=2" in line("torchrun", {"CUDA_VISIBLE_DEVICES": "GPU-8f3,GPU-aa1"})


def test_a_cluster_hostfile_does_not_send_the_run_to_other_machines(tmp_path, monkeypatch):
    (tmp_path / "hostfile").write_text("n1 slots=8\n")
    monkeypatch.setattr(commands, "_DEEPSPEED_HOSTFILE", tmp_path / "hostfile")
    words = line("deepspeed")
    assert words[words.index("--hostfile") + 1] == "none"


def test_a_launcher_that_is_not_there_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MachineError, match="'deepspeed' is neither beside"):
        line("deepspeed")
    other = tmp_path / "torchrun"
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    assert line("torchrun")[0] == str(other)


def test_ports_are_free_and_differ():
    ports = {commands.free_port() for _ in range(5)}
    assert len(ports) > 1
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", ports.pop()))


def test_environment_of_the_ranks(tmp_path):
    given = {"PATH": "/bin", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7", "OMP_NUM_THREADS": "64"}
    found = child_environment(given, launcher="deepspeed", device="cpu", threads=3, extensions=tmp_path)
    assert found == {
        "PATH": "/bin",
        "SLURM_JOB_ID": "7",
        "OMP_NUM_THREADS": "3",
        "TORCH_EXTENSIONS_DIR": str(tmp_path),
        "DS_ACCELERATOR": "cpu",
    }
    own = child_environment(
        {"TORCH_EXTENSIONS_DIR": "/mine"}, launcher="torchrun", device="cuda", threads=1, extensions=tmp_path
    )
    assert own["TORCH_EXTENSIONS_DIR"] == "/mine" and own["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert "DS_ACCELERATOR" not in own


def test_stale_build_locks_are_removed_and_held_ones_stay(tmp_path):
    folder = extensions_folder(tmp_path)
    assert folder.is_relative_to(tmp_path)
    for name in ("stale", "held"):
        (folder / name).mkdir(parents=True)
        (folder / name / "lock").touch()
    handle = os.open(folder / "held" / "lock", os.O_RDWR)
    try:
        fcntl.fcntl(handle, fcntl.F_GETFD)
        assert extensions_folder(tmp_path) == folder
        assert not (folder / "stale" / "lock").exists() and (folder / "held" / "lock").exists()
    finally:
        os.close(handle)


def test_ranks_get_the_settled_run_directory(tmp_path):
    target = commands.target_of("r.yaml", ("a=1", "run.dir=/x", "run.root=y"), tmp_path)
    assert target.arguments == ("train", "r.yaml", "a=1", "run.root=y", f"run.dir={tmp_path}")
