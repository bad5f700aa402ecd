"""The real launchers, few times since each start takes seconds: who may die, and what is left then (nothing)."""

import signal
import time

from launch_support import LOOPBACK, VENV, front, listeners, started, until

from camshaft.processes import Process, alive, ancestors, command, identify, in_session, send

DEEPSPEED = [str(VENV / "deepspeed"), "-q", "--num_gpus", "2", "--module", "stub_rank"]
TORCHRUN = [str(VENV / "torchrun"), "--nproc-per-node", "2", "-m", "stub_rank"]
QUIET = {"DS_ACCELERATOR": "cpu"}


def words_of(process: Process) -> str:
    return " ".join(command(process.pid))


def test_deepspeed_under_the_front_reports_a_killed_rank(tmp_path):
    run = tmp_path / "run"
    with started(front(run, "deepspeed", "calm"), tmp_path / "out") as process:
        beats = process.steps(run, 2, 5)
        began = time.monotonic()
        send(beats[1].process, signal.SIGKILL)
        assert process.wait(30) == 1 and time.monotonic() - began < 30
    assert "rank 1 was killed (SIGKILL" in process.text() and "during backward" in process.text()


def test_deepspeed_whose_launcher_is_killed_reports_0_and_the_front_does_not(tmp_path):
    run = tmp_path / "run"
    with started(front(run, "deepspeed", "calm"), tmp_path / "out") as process:
        beats = process.steps(run, 2, 5)
        agent = next(p for p in ancestors(beats[0].process.pid) if "deepspeed.launcher.launch" in words_of(p))
        send(agent, signal.SIGKILL)
        until(lambda: not any(alive(beat.process) for beat in beats), 5)
        assert process.wait(20) == 1
    assert "lost its ranks" in process.text()


def test_the_deepspeed_command_alone_stopped_by_sigterm_takes_its_ranks_along(tmp_path):
    """Without our front: the command dies, its launcher and ranks stay; ours write a checkpoint and end."""
    run = tmp_path / "run"
    with started([*DEEPSPEED, "calm"], tmp_path / "out", STUB_RUN=str(run), **QUIET) as process:
        logs = [run / "logs" / f"rank_{rank}.log" for rank in range(2)]
        until(lambda: all(log.exists() and "rank" in log.read_text() for log in logs), 60, process.text())
        pids = [int(log.read_text().split("pid ")[1].split()[0]) for log in logs]
        ranks = [identify(pid) for pid in pids]
        assert None not in ranks
        process.others.update(ranks)
        time.sleep(0.6)
        process.popen.send_signal(signal.SIGTERM)
        process.wait(10)
        until(lambda: not any(alive(rank) for rank in ranks), 10)
        until(lambda: not in_session(process.popen.pid), 10, "its launcher ends too")
        until(lambda: (run / "saved_0").exists() and (run / "saved_1").exists(), 1)
    assert "hello from rank 0" in process.text() and "hello from rank 1" not in process.text()


def test_torchrun_under_the_front_listens_nowhere_and_stops_on_request(tmp_path):
    run = tmp_path / "run"
    with started(front(run, "torchrun", "calm"), tmp_path / "out") as process:
        beats = process.steps(run, 2, 5)
        family = {beat.process for beat in beats} | set(process.others)
        open_to = {address for one in family if alive(one) for address in listeners(one.pid)}
        assert open_to <= LOOPBACK
        process.popen.send_signal(signal.SIGTERM)
        assert process.wait(25) == 130
    assert (run / "saved_0").exists() and (run / "saved_1").exists()


def test_torchrun_whose_front_is_killed_does_not_stay(tmp_path):
    run = tmp_path / "run"
    with started(front(run, "torchrun", "calm"), tmp_path / "out") as process:
        beats = process.steps(run, 2, 5)
        agent = next(each for each in ancestors(beats[0].process.pid) if "torchrun" in words_of(each))
        process.others.add(agent)
        process.popen.kill()
        until(lambda: not any(alive(beat.process) for beat in beats), 4, "the ranks of a killed front end")
        until(lambda: not alive(agent), 10, "torchrun ends too")


def test_torchrun_alone_killed_leaves_no_rank(tmp_path):
    run = tmp_path / "run"
    with started([*TORCHRUN, "calm"], tmp_path / "out", STUB_RUN=str(run)) as process:
        logs = [run / "logs" / f"rank_{rank}.log" for rank in range(2)]
        until(lambda: all(log.exists() and "pid" in log.read_text() for log in logs), 60, process.text())
        ranks = [identify(int(log.read_text().split("pid ")[1].split()[0])) for log in logs]
        process.others.update(rank for rank in ranks if rank)
        time.sleep(0.5)
        process.popen.kill()
        until(lambda: not process.left(), 5)
    assert not (run / "saved_0").exists()
