"""The front over stub ranks and a quick launcher: every way in which a run can end."""

import contextlib
import os
import re
import signal
import subprocess
import time

import pytest
from launch_support import clean_environment, front, started, until

from camshaft.processes import Process, alive, ancestors, command, identify, send


def launcher_process(rank: Process) -> Process:
    return next(process for process in ancestors(rank.pid) if "deepspeed.launcher.launch" in command(process.pid))


def test_success_is_every_rank_leaving_a_record_with_status_0(tmp_path):
    run = tmp_path / "run"
    with started(front(run, "fake", "calm"), tmp_path / "out", STUB_STEPS="10") as process:
        assert process.wait() == 0
        process.note(run)
    assert "hello from rank 0" in process.text(), "rank 0 writes where the front writes"
    assert "hello from rank 1" not in process.text()
    assert "hello from rank 1" in (run / "logs" / "rank_1.log").read_text()


def test_killed_rank_ends_the_run_and_is_named(tmp_path):
    run = tmp_path / "run"
    with started(front(run, "fake", "calm"), tmp_path / "out") as process:
        beats = process.steps(run, 2, 7)
        began = time.monotonic()
        assert send(beats[1].process, signal.SIGKILL)
        assert process.wait(30) == 1
        assert time.monotonic() - began < 30
    assert "rank 1 was killed (SIGKILL" in process.text()
    assert process.text().rstrip().endswith("no checkpoint yet: the same command starts again from step 0")
    assert "during backward" in process.text()
    step = int(process.text().split("at step ")[1].split()[0])
    assert 7 <= step < 60


@pytest.mark.parametrize(
    ("mode", "status", "cause"),
    [
        ("nan", 5, "rank 1 at step 5 during backward: train/loss is nan at step 5"),
        ("memory", 4, "rank 1 at step 5 during backward: MemoryError: 12 GiB"),
        ("crash", 1, "rank 1 crashed (Aborted) at step 5"),
        ("early", 1, "rank 1 ended without a word"),
        ("sleepy", 1, "a collective waited 5 s in vain: rank 1 has been at step 5 during backward since then"),
        ("seven", 1, "rank 1 ended by itself with status 7, without an error"),
    ],
)
def test_the_first_cause_is_reported_and_not_what_peers_saw_of_it(tmp_path, mode, status, cause):
    run = tmp_path / "run"
    with started(front(run, "fake", mode), tmp_path / "out", STUB_STEPS="40") as process:
        assert process.wait(30) == status, process.text()
        process.note(run)
    assert cause in process.text()
    assert "Connection closed" not in process.text()


def test_killed_launcher_is_a_failure_and_leaves_no_rank(tmp_path):
    run = tmp_path / "run"
    with started(front(run, "fake", "calm"), tmp_path / "out") as process:
        beats = process.steps(run, 2, 3)
        (run / "checkpoints" / "step_00000002").mkdir()
        assert send(launcher_process(beats[0].process), signal.SIGKILL)
        until(lambda: not any(alive(beat.process) for beat in beats), 4, "the ranks of a killed launcher end")
        assert process.wait(15) == 1
    assert "lost its ranks" in process.text() and "SIGKILL" in process.text()
    assert process.text().rstrip().endswith("without --fresh, continues from the last checkpoint")


def test_killed_front_leaves_nothing_running(tmp_path):
    run = tmp_path / "run"
    with started(front(run, "fake", "calm"), tmp_path / "out") as process:
        beats = process.steps(run, 2, 3)
        process.popen.kill()
        until(lambda: not any(alive(beat.process) for beat in beats), 4, "the ranks of a killed front end")
        until(lambda: not process.left(), 10, "the launcher of a killed front ends")


def test_rank_0_of_a_killed_front_says_it_on_the_terminal_that_it_was_lent(tmp_path):
    """One rank: of two, the second may end first, and then the launcher asks rank 0 to stop."""
    run = tmp_path / "run"
    with started(front(run, "fake", "calm", 1), tmp_path / "out") as process:
        beats = process.steps(run, 1, 3)
        (run / "checkpoints" / "step_00000002").mkdir()
        process.popen.kill()
        until(lambda: not alive(beats[0].process), 4, "the rank of a killed front ends")
        until(lambda: not process.left(), 10, "the launcher of a killed front ends")
    assert not (run / "saved_0").exists()
    assert "error: its front, `camshaft train`, (pid" in process.text()
    assert process.text().rstrip().endswith("without --fresh, continues from the last checkpoint")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_front_stops_every_rank_after_a_checkpoint(tmp_path, signum):
    run = tmp_path / "run"
    with started(front(run, "fake", "calm"), tmp_path / "out") as process:
        process.steps(run, 2, 3)
        began = time.monotonic()
        process.popen.send_signal(signum)
        assert process.wait(25) == 130
        assert time.monotonic() - began < 25
    assert (run / "saved_0").exists() and (run / "saved_1").exists()
    assert "a checkpoint was written" in process.text()


def test_a_second_request_ends_everything_at_once(tmp_path):
    run = tmp_path / "run"
    with started(front(run, "fake", "deaf"), tmp_path / "out") as process:
        process.steps(run, 2, 3)
        process.popen.send_signal(signal.SIGINT)
        time.sleep(1.5)
        assert process.popen.poll() is None, "ranks get time for a checkpoint"
        process.popen.send_signal(signal.SIGINT)
        assert process.wait(4) == 130


def test_a_request_before_the_ranks_began_ends_the_launcher(tmp_path):
    """The launcher is one that never starts a rank, so that none can begin before the request is heard."""
    run = tmp_path / "run"
    log = run / "logs" / "launcher.log"

    def said() -> list[str]:
        return re.findall(r"^held (\d+)$", log.read_text(), re.MULTILINE) if log.exists() else []

    with started(front(run, "held", "calm"), tmp_path / "out") as process:
        until(said)
        launcher = identify(int(said()[0]))
        assert launcher is not None
        process.others.add(launcher)
        process.popen.send_signal(signal.SIGTERM)
        assert process.wait(25) == 130
    assert "stopped before the first step" in process.text()


def test_a_launcher_that_cannot_start_ranks_is_named_with_its_last_words(tmp_path):
    run = tmp_path / "run"
    with started(front(run, "broken", "calm"), tmp_path / "out") as process:
        assert process.wait(20) == 3
    assert "before a rank began" in process.text() and "no such accelerator" in process.text()


def test_a_launcher_without_memory_is_one_line_and_status_4(tmp_path):
    run = tmp_path / "run"
    with started(front(run, "starved", "calm"), tmp_path / "out") as process:
        assert process.wait(20) == 4
    assert "memory ran out while the launcher" in process.text() and "MemoryError" not in process.text()


def test_a_rank_that_never_begins_is_named(tmp_path):
    run = tmp_path / "run"
    with started(front(run, "half", "calm"), tmp_path / "out", STUB_STEPS="3") as process:
        assert process.wait(20) == 1
        process.note(run)
    assert "rank 1 never began" in process.text()


def test_rank_0_gets_the_fronts_terminal(tmp_path):
    leader, follower = os.openpty()
    line = front(tmp_path / "run", "fake", "calm")
    environ = clean_environment(STUB_STEPS="2")
    process = subprocess.Popen(line, env=environ, stdout=follower, stderr=follower, start_new_session=True)
    os.close(follower)
    text = b""
    try:
        with contextlib.suppress(OSError):  # EIO: everybody has closed the terminal
            while part := os.read(leader, 4096):
                text += part
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        os.close(leader)
    assert b"hello from rank 0, terminal: True" in text and b"rank 1" not in text
