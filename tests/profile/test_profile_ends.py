"""How ``camshaft profile`` ends when no profile comes of it: with what status, and with what left on the disk."""

import signal
import subprocess
import sys
import time

import pytest

import small_folder
from camshaft.cli import run
from camshaft.profiling import findings
from small_folder import ONE, TWO

RECIPE = small_folder.recipe(
    batch={"micro_batch_size": 2, "global_batch_size": 8},
    training={"max_epochs": 200, "log_every": 1},
    launch=TWO,
    plugins={"ddp": {"bucket_size_mb": 0.01}, "adamw": {"lr": 1e-3}},
)
SHORT = ["training.max_epochs=1", "--warmup=500"]


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    small_folder.enter(tmp_path, monkeypatch)
    return small_folder.fill(tmp_path, RECIPE)


def test_a_profile_that_is_refused_leaves_no_folder(recipe, tmp_path, capsys):
    assert run(["profile", str(recipe), *ONE, *SHORT, "--out=a/b/made"]) == 2
    assert "Lower --warmup or --steps" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    (tmp_path / "mine").mkdir()
    assert run(["profile", str(recipe), *ONE, *SHORT, "--out=mine/made"]) == 2
    assert run(["profile", str(recipe), *ONE, *SHORT, "--out=mine"]) == 2
    assert (tmp_path / "mine").is_dir() and not list((tmp_path / "mine").iterdir())
    assert run(["profile", str(recipe), *ONE, *SHORT]) == 2
    assert not (tmp_path / "runs").exists()


def test_ranks_that_are_refused_leave_no_folder(recipe, tmp_path):
    line = [sys.executable, "-m", "camshaft", "profile", str(recipe), *SHORT, "--out=made"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "Lower --warmup or --steps" in done.stderr and "made/logs" not in done.stderr
    assert not (tmp_path / "made").exists()


def test_a_profile_that_fails_leaves_its_logs_and_can_be_tried_again(recipe, tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise OSError("no trace today")

    with monkeypatch.context() as changed:
        changed.setattr(findings, "examine", broken)
        with pytest.raises(OSError, match="no trace today"):
            run(["profile", str(recipe), *ONE, "--warmup=0", "--out=made"])
    assert [each.name for each in (tmp_path / "made").iterdir()] == ["logs"]
    assert "no trace today" in (tmp_path / "made" / "logs" / "rank_0.log").read_text()
    assert run(["profile", str(recipe), *ONE, "--warmup=0", "--out=made"]) == 0
    assert (tmp_path / "made" / "profile.json").exists()
    capsys.readouterr()
    assert run(["profile", str(recipe), *ONE, "--warmup=0", "--out=made"]) == 2
    assert "--out made is not an empty folder" in capsys.readouterr().err
    assert (tmp_path / "made" / "profile.json").exists()


@pytest.mark.parametrize("windows", [["--warmup=100000"], ["--warmup=0", "--steps=100000"]], ids=["before", "while"])
@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_ends_with_130_and_leaves_no_folder(recipe, tmp_path, processes, windows):
    """Also while windows are recorded, when the profiler has much to throw away."""
    line = [sys.executable, "-m", "camshaft", "profile", str(recipe), *(ONE if processes == 1 else []), *windows]
    status = tmp_path / "made" / "heartbeat"
    with subprocess.Popen(
        [*line, "training.max_epochs=100000", "--out=made"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        limit = time.monotonic() + 60
        while not status.exists() and time.monotonic() < limit:
            time.sleep(0.05)
        time.sleep(3 * processes)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "stopped: " in err and "error: " not in err
    assert not (tmp_path / "made").exists()


def test_a_trial_or_a_profile_has_nothing_to_write_before_it_stops(tmp_path):
    """What does not look at the request is ended soon, as stopped and not as failed."""
    script = (
        "import os, signal, time\n"
        "from camshaft.cli.launch import rank\n"
        "rank.QUICK_S = 1.0\n"
        "from camshaft.environment import Environment\n"
        "def work(station):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(30)\n"
        "    return 0\n"
        "rank.supervised(Environment(), work, keeps=False)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=20)
    assert done.returncode == 130, done.stderr
    assert done.stderr == "stopped: asked to stop, and stopped at once\n"
