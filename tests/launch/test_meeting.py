"""Two forked ranks: rendezvous, what listens, groups, the side channel, threads."""

import multiprocessing
import os
import stat
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launch_support import HERE, LOOPBACK, clean_environment, listeners

from camshaft.cli.launch.commands import free_port
from camshaft.distributed import (
    Control,
    Environment,
    check_agreement,
    connect,
    disconnect,
    pick_device,
    rendezvous_folder,
    set_threads,
    share_text,
    threads_per_rank,
)
from camshaft.errors import MachineError
from camshaft.recipe.schema import Launch


def _child(body, rank, size, folder, results):
    os.environ["CAMSHAFT_JOB"] = str(folder)
    os.environ.pop("GLOO_SOCKET_IFNAME", None)
    try:
        results.put((rank, body(Environment(rank, rank, size, size, "torchrun"), folder), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


def ranks(body, folder, size=2):
    """Results of ``body(environment, folder)`` on forked ranks, in rank order."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_child, args=(body, rank, size, folder, results)) for rank in range(size)]
    for process in processes:
        process.start()
    try:
        found = sorted((results.get(timeout=30) for _ in range(size)), key=lambda item: item[0])
    finally:
        for process in processes:
            process.join(5)
            process.kill()
            process.join()
    assert [item[2] for item in found] == [None] * size, found
    return [item[1] for item in found]


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory(prefix="camshaft-test-") as path:
        yield Path(path)


def test_one_node_listens_on_loopback_only(folder):
    def body(environment, folder):
        connect(environment, "cpu", 20)
        connect(environment, "cpu", 20)  # the second time does nothing
        control = Control(environment, 20)
        total = torch.tensor([environment.rank + 1.0])
        dist.all_reduce(total)
        control.start([1])
        found = listeners(os.getpid())
        backend, sums = dist.get_backend(), control.finish()
        control.close()
        disconnect()
        return found, backend, float(total), sums, dist.is_initialized()

    for found, backend, total, sums, left in ranks(body, folder):
        assert found and found <= LOOPBACK
        assert (backend, total, sums, left) == ("gloo", 3.0, [2], False)


def test_two_nodes_meet_at_the_masters_address(folder):
    def body(environment, folder):
        place = Environment(environment.rank, 0, 2, 1, "slurm", 2, ("127.0.0.1", port))
        connect(place, "cpu", 20)
        total = torch.tensor([environment.rank + 1.0])
        dist.all_reduce(total)
        disconnect()
        return float(total), list(folder.iterdir())

    port = free_port()
    assert ranks(body, folder) == [(3.0, [])] * 2


def test_control_sums_beside_the_training_and_keeps_large_integers(folder):
    def body(environment, folder):
        connect(environment, "cpu", 20)
        control = Control(environment, 20)
        seen = []
        for step in range(5):
            control.start([environment.rank, 2**60, step])
            dist.all_reduce(torch.ones(1000))  # the default group is not in its way
            seen.append(control.finish())
        control.start([0])
        with pytest.raises(RuntimeError, match="twice"):
            control.start([0])
        control.finish()
        disconnect()
        return seen

    assert ranks(body, folder) == [[[1, 2**61, 2 * step] for step in range(5)]] * 2


def test_control_of_one_process_returns_what_it_got():
    control = Control(Environment())
    control.start([3, 4])
    assert control.finish() == [3, 4]
    control.start([])
    assert control.finish() == []


def test_text_of_rank_0_reaches_all(folder):
    def body(environment, folder):
        connect(environment, "cpu", 20)
        found = [share_text(environment, text if environment.rank == 0 else None) for text in ("läuft in /run/x y", "")]
        disconnect()
        return found

    assert ranks(body, folder) == [["läuft in /run/x y", ""]] * 2
    assert share_text(Environment(), "alone") == "alone"


def test_disagreement_is_named_on_every_rank(folder):
    def body(environment, folder):
        connect(environment, "cpu", 20)
        check_agreement(environment, "the same")
        try:
            check_agreement(environment, "a" if environment.rank != 1 else "b")
        except MachineError as error:
            return str(error)
        finally:
            disconnect(failed=True)

    found = ranks(body, folder, 3)
    assert all("rank(s) 1 have another recipe" in text for text in found)
    check_agreement(Environment(), "alone")


def test_a_rank_that_does_not_come_is_a_clear_error(folder):
    os.environ["CAMSHAFT_JOB"] = str(folder)
    began = time.monotonic()
    try:
        with pytest.raises(MachineError, match="rank 0 of 2 could not meet the other ranks within 1 s"):
            connect(Environment(0, 0, 2, 2, "torchrun"), "cpu", 1)
    finally:
        del os.environ["CAMSHAFT_JOB"]
        disconnect(failed=True)
    assert time.monotonic() - began < 15


def test_one_process_connects_to_nothing():
    connect(Environment(), "cpu", 5)
    assert not dist.is_initialized()
    disconnect()


# One write a line: several children share the pipe, and an unbuffered print writes the line's end by itself.
NAME = "import os; from camshaft.distributed import rendezvous_folder as f; os.write(1, f'{f(os.environ)}\\n'.encode())"


def folders(count, **environ):
    """Folders that ``count`` children of one launcher derive, some through a shell in between."""
    launcher = (
        "import subprocess, sys\n"
        f"a = [[sys.executable, '-c', {NAME!r}]] * {count - 1}\n"
        f"b = [['sh', '-c', 'true; \"$0\" -c \"$1\"; true', sys.executable, {NAME!r}]]\n"
        "ps = [subprocess.Popen(x) for x in a + b]\n"
        "sys.exit(max(p.wait() for p in ps))"
    )
    line = [sys.executable, "-c", launcher, "deepspeed.launcher.launch"]
    text = subprocess.run(line, env=clean_environment(**environ), capture_output=True, text=True, check=True).stdout
    return text.split()


def test_all_ranks_of_a_job_and_no_other_job_meet_in_one_folder(tmp_path):
    first, second = folders(3, TMPDIR=str(tmp_path)), folders(2, TMPDIR=str(tmp_path))
    restarted = folders(2, TMPDIR=str(tmp_path), TORCHELASTIC_RESTART_COUNT="1")
    assert len(first) == 3 and len(set(first)) == 1, "also through a wrapper script"
    assert len({first[0], second[0], restarted[0]}) == 3
    for name in (first[0], second[0]):
        assert Path(name).parent == tmp_path and stat.S_IMODE(Path(name).stat().st_mode) == 0o700


def test_a_folder_that_others_can_enter_is_refused(tmp_path):
    loose = tmp_path / "job"
    loose.mkdir(mode=0o755)
    with pytest.raises(MachineError, match="not a private folder"):
        rendezvous_folder({"CAMSHAFT_JOB": str(loose)})
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(MachineError, match="not a private folder"):
        rendezvous_folder({"CAMSHAFT_JOB": str(tmp_path / "link")})


def test_threads_do_not_depend_on_the_launcher(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    monkeypatch.setenv("OMP_NUM_THREADS", "77")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # so that what set_threads sets is undone
    for launcher in ("none", "deepspeed", "torchrun", "slurm"):
        assert threads_per_rank(Environment(0, 0, 2, 2, launcher), "auto") == max(1, cores // 2)
        assert threads_per_rank(Environment(0, 0, 2, 2, launcher), 3) == 3
    assert threads_per_rank(Environment(0, 0, 999, 999, "torchrun"), "auto") == 1
    before = torch.get_num_threads()
    try:
        assert set_threads(Environment(), 2) == 2 == torch.get_num_threads()
        assert os.environ["OMP_NUM_THREADS"] == "2"
    finally:
        torch.set_num_threads(before)
        monkeypatch.delenv("MKL_NUM_THREADS", raising=False)


@pytest.mark.parametrize(("given", "used"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "active"}, "ACTIVE")])
def test_threads_sleep_while_they_wait_unless_the_user_wants_otherwise(given, used):
    """As torch's OpenMP reports it, which reads the environment once, when it is loaded."""
    code = "from camshaft.distributed import Environment, set_threads; set_threads(Environment(), 2)"
    environ = {name: value for name, value in clean_environment().items() if name != "OMP_WAIT_POLICY"}
    environ |= {"OMP_DISPLAY_ENV": "true", **given}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert f"OMP_WAIT_POLICY = '{used}'" in done.stderr


def test_ranks_bound_to_cores_of_their_own_use_all_of_them(tmp_path):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core cannot be divided")
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from camshaft.distributed import Environment, threads_per_rank\n"
        "print(threads_per_rank(Environment(0, 0, 2, 2, 'deepspeed'), 'auto'))"
    )
    launcher = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {code!r}, {str(HERE)!r}]))"
    line = [sys.executable, "-c", launcher, "deepspeed.launcher.launch"]
    assert subprocess.run(line, env=clean_environment(), capture_output=True, text=True, check=True).stdout == "1\n"


def test_devices(monkeypatch):
    two = Environment(1, 1, 2, 2, "slurm")
    assert pick_device(Launch(device="cpu"), two) == torch.device("cpu")
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device(Launch(), two) == torch.device("cuda", 1) and current == [1]
    with pytest.raises(MachineError, match=r"rank 2 is number 2 on its node, which has 2 GPU"):
        pick_device(Launch(), Environment(2, 2, 3, 3, "torchrun"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device(Launch(), two) == torch.device("cuda", 0), "srun --gpus-per-task"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(MachineError, match="no GPU"):
        pick_device(Launch(device="cuda"), two)
