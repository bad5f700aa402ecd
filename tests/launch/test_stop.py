"""Requests to stop: flags, limits, repeats, children, and ends of launchers."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from launch_support import clean_environment, started, until

from camshaft.cli.launch.watch import StopSignal, Watchdog, Watched
from camshaft.processes import Process, identify

PROGRAM = """
import os, sys, time, signal
from camshaft.cli.launch.watch import StopSignal, exit_at_once
def force(status, kind, reason):
    print(kind, reason, flush=True)
    exit_at_once(status, kind, reason)
stop = StopSignal(force=force, grace_s=float(sys.argv[1]), repeat_ends=sys.argv[2] == "1").install()
print("ready", flush=True)
{body}
"""
LOOP = """
while not stop.requested:
    time.sleep(0.01)
print("requested", stop.requested, flush=True)
time.sleep(30)
"""
# In C, without the interpreter's lock, for minutes: no Python handler can run in the main thread.
BLOCKED = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'x', b'y', 10**9)"


@pytest.fixture
def program(tmp_path):
    scripts = []

    def run(body=LOOP, grace=20.0, repeat="1"):
        script = tmp_path / f"program{len(scripts)}.py"
        script.write_text(PROGRAM.format(body=body))
        context = started([sys.executable, str(script), str(grace), repeat], tmp_path / f"out{len(scripts)}")
        process = context.__enter__()
        scripts.append(context)
        until(lambda: "ready" in process.text(), 20)
        return process

    yield run
    for context in scripts:
        context.__exit__(None, None, None)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_sets_the_flag(program, signum):
    process = program()
    process.popen.send_signal(signum)
    until(lambda: f"requested {int(signum)}" in process.text(), 5)
    assert process.popen.poll() is None


def test_the_limit_ends_a_process_that_cannot_stop(program):
    process = program(grace=1.0)
    began = time.monotonic()
    process.popen.send_signal(signal.SIGTERM)
    assert process.wait(10) == 1 and 0.9 < time.monotonic() - began < 4
    assert "forced could not stop within 1 s" in process.text()


def test_the_limit_holds_while_the_main_thread_is_stuck_in_c(program):
    process = program(BLOCKED, grace=0.5)
    process.popen.send_signal(signal.SIGTERM)
    assert process.wait(10) == 1


def test_the_second_request_of_a_kind_ends_at_once_and_its_echoes_do_not(program):
    process = program()
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM, signal.SIGINT):  # terminal, then launcher, at once
        process.popen.send_signal(signum)
        time.sleep(0.1)
    time.sleep(1.2)
    assert process.popen.poll() is None
    process.popen.send_signal(signal.SIGINT)
    assert process.wait(2) == 130
    assert "second time" in process.text()


def test_ranks_of_a_front_leave_repeats_to_it(program):
    process = program(repeat="0")
    process.popen.send_signal(signal.SIGTERM)
    time.sleep(1.3)
    process.popen.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.popen.poll() is None


def test_a_forked_childs_signal_does_not_stop_its_parent(program):
    body = """
child = os.fork()
if child == 0:
    time.sleep(30)
    os._exit(0)
time.sleep(0.2)
os.kill(child, signal.SIGTERM)
_, status = os.waitpid(child, 0)
print("child ended by", os.WTERMSIG(status), "parent asked", stop.requested, flush=True)
"""
    process = program(body)
    assert process.wait(10) == 0
    assert "child ended by 15 parent asked 0" in process.text()


def test_nohup_is_respected(tmp_path):
    script = tmp_path / "p.py"
    script.write_text(
        "import signal; from camshaft.cli.launch.watch import StopSignal\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN); stop = StopSignal().install()\n"
        "assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN\n"
    )
    assert subprocess.run([sys.executable, str(script)], env=clean_environment(), check=False).returncode == 0


def test_signals_are_given_back():
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    stop = StopSignal().install()
    assert signal.getsignal(signal.SIGINT) != before[signal.SIGINT]
    stop.request(signal.SIGTERM)
    until(lambda: stop.requested, 5)
    stop.uninstall()
    assert {signum: signal.getsignal(signum) for signum in before} == before
    assert signal.set_wakeup_fd(-1) == -1


@contextmanager
def watchdog(watched):
    forced = []

    def force(status, kind, reason):
        forced.append((status, kind, reason))

    stop = StopSignal()
    yield Watchdog(watched, stop, force), stop, forced
    stop.uninstall()


def test_a_gone_front_ends_the_rank_and_a_gone_runner_asks_it_to_stop():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = identify(child.pid)
    assert process is not None
    with watchdog([Watched(process, "front")]) as (dog, _, forced):
        dog._look()
        assert forced == []
        child.communicate(b"\n")
        dog._look()
        assert forced == [(1, "orphan", f"its front (pid {child.pid}) is gone")]
        dog._look()
        assert len(forced) == 1
    with watchdog([Watched(process, "deepspeed command", checkpoint_first=True)]) as (dog, stop, forced):
        dog._look()
        assert forced == [] and stop._reader.recv(8) == bytes([signal.SIGTERM])


def test_a_stop_under_way_is_not_cut_short_by_the_end_of_the_launcher():
    with watchdog([Watched(Process(os.getpid(), 1), "launcher")]) as (dog, stop, forced):
        stop.requested = signal.SIGTERM
        dog._look()
        assert forced == []
