"""The heartbeat file, exit records, and the judgement over them."""

import multiprocessing
import os
import time

import pytest

from camshaft.cli.launch import exits, heartbeat
from camshaft.cli.launch.cause import RankView, judge
from camshaft.errors import (
    CamshaftError,
    Interrupted,
    MachineError,
    NonFiniteLoss,
    OutOfMemory,
    PluginError,
    RecipeError,
)
from camshaft.processes import Process, alive, identify, myself, send


def beat_in_child(path, rank, ready, go):
    heart = heartbeat.Heartbeat()
    heart.beat(3, "data")
    heart.attach(path, rank)
    ready.set()
    go.wait(10)
    heart.beat(2**40 + rank, "backward")


def test_the_front_reads_what_other_processes_write(tmp_path):
    path = tmp_path / "heartbeat"
    heartbeat.create(path, 3)
    assert heartbeat.read(path) == [] and path.stat().st_mode & 0o777 == 0o600
    context = multiprocessing.get_context("fork")
    ready, go = [context.Event() for _ in range(2)], context.Event()
    ranks = [context.Process(target=beat_in_child, args=(path, r * 2, ready[r], go)) for r in range(2)]
    for rank in ranks:
        rank.start()
    assert all(event.wait(10) for event in ready)
    first = heartbeat.read(path)
    assert [(beat.rank, beat.process.pid, beat.step, beat.phase) for beat in first] == [
        (0, ranks[0].pid, 3, "data"),
        (2, ranks[1].pid, 3, "data"),
    ]
    assert all(alive(beat.process) for beat in first)
    go.set()
    for rank in ranks:
        rank.join(10)
    assert [(beat.step, beat.phase) for beat in heartbeat.read(path)] == [(2**40, "backward"), (2**40 + 2, "backward")]
    assert not any(alive(beat.process) for beat in first)


def test_a_beat_costs_next_to_nothing(tmp_path):
    heartbeat.create(tmp_path / "heartbeat", 1)
    heart = heartbeat.Heartbeat()
    heart.attach(tmp_path / "heartbeat", 0)
    best = 1.0
    for _ in range(20):
        start = time.perf_counter()
        for step in range(1000):
            heart.beat(step, "backward")
        best = min(best, time.perf_counter() - start)
    assert best / 1000 < 2e-6
    assert heart.progress == (999, "backward")


def test_unknown_phases_and_foreign_files_do_no_harm(tmp_path):
    heart = heartbeat.Heartbeat()
    heart.beat(1, "a phase of a later version")
    assert heart.progress == (1, "start")
    (tmp_path / "junk").write_bytes(b"x" * 999)
    assert heartbeat.read(tmp_path / "junk") == [] and heartbeat.read(tmp_path / "none") == []


def test_a_new_file_is_out_of_reach_of_an_earlier_runs_rank(tmp_path):
    path = tmp_path / "heartbeat"
    heartbeat.create(path, 1)
    old = heartbeat.Heartbeat()
    old.attach(path, 0)
    heartbeat.create(path, 1)
    old.beat(7, "save")
    assert heartbeat.read(path) == []


def test_a_reused_pid_is_not_the_same_process():
    own = myself()
    other = Process(own.pid, own.start - 1)
    assert alive(own) and not alive(other) and not send(other, 0) and send(own, 0)
    assert Process.parse(str(own)) == own and Process.parse("12") is None
    assert identify(2**22 + 1) is None


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("x"), (1, "error")),
        (MemoryError(), (4, "error")),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), (4, "error")),
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"), (1, "connection")),
        (RuntimeError("Timed out waiting 3000ms for recv operation to complete"), (1, "connection")),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), (4, "error")),
        (OSError(12, "Cannot allocate memory"), (4, "error")),
        (ImportError("no module named torch"), (1, "error")),
        (NonFiniteLoss("nan"), (5, "error")),
        (RecipeError("bad"), (2, "error")),
        (MachineError("bad"), (3, "error")),
        (Interrupted("stop"), (130, "error")),
        (OutOfMemory("gone"), (4, "error")),
        (ValueError("connection closed by peer"), (1, "error")),
    ],
)
def test_errors_have_a_status_and_a_kind(error, expected):
    assert exits.classify(error) == expected


def test_a_plugins_error_is_judged_by_what_it_came_from():
    def wrapped(cause):
        try:
            try:
                raise cause
            except Exception as error:
                raise PluginError("ddp", "reduce", str(error)) from error
        except PluginError as error:
            return exits.classify(error)

    assert wrapped(RuntimeError("Connection reset by peer")) == (1, "connection")
    assert wrapped(MemoryError("no")) == (4, "error")
    assert wrapped(KeyError("k")) == (1, "error")


def test_a_record_belongs_to_one_process(tmp_path):
    record = exits.make_record(1, 5, "error", "nan", (7, "log"))
    exits.write_record(tmp_path, record)
    assert exits.read_record(tmp_path, 1, myself()) == record
    assert exits.read_record(tmp_path, 1, Process(os.getpid(), 1)) is None
    assert exits.read_record(tmp_path, 0, myself()) is None
    exits.record_path(tmp_path, 1).write_text('{"rank": 1')
    assert exits.read_record(tmp_path, 1, myself()) is None


def view(rank, status=0, kind="end", error="", at=100.0, *, vanished=False, killed=False):
    process = Process(1000 + rank, 1)
    record = exits.ExitRecord(rank, *process, status, kind, error, 9, "backward", at)
    return RankView(rank, process, 9, "backward", None if vanished else record, at, killed)


class TestJudge:
    def judge(self, tmp_path, views, status=1, launcher="deepspeed", memory=0, processes=2):
        return judge(views, processes, launcher, status, tmp_path, memory)

    def test_success_needs_every_record(self, tmp_path):
        assert self.judge(tmp_path, [view(0), view(1)], 0).status == 0
        assert self.judge(tmp_path, [view(0)], 0).status == 1
        assert self.judge(tmp_path, [view(0), view(1, vanished=True)], 0).status == 1

    def test_a_launcher_that_reports_0_is_not_believed(self, tmp_path):
        ranks = [view(0, 1, "orphan", "gone"), view(1, 1, "connection", "closed")]
        found = self.judge(tmp_path, ranks, 0)
        assert found.status == 1 and "'deepspeed'" in found.message and "ended with status 0" in found.message

    def test_interrupted_when_all_stopped(self, tmp_path):
        assert self.judge(tmp_path, [view(0, 130, error="saved"), view(1, 130)]).status == 130
        assert self.judge(tmp_path, [view(0, 130, error="saved"), view(1, 1, "connection")]).status == 1

    def test_the_first_own_error_wins_over_earlier_echoes(self, tmp_path):
        ranks = [view(0, 1, "connection", "closed", 99.0), view(1, 5, "error", "nan", 100.0)]
        found = self.judge(tmp_path, ranks)
        assert found.status == 5 and found.message.startswith("rank 1 at step 9 during backward: nan")

    def test_a_vanished_rank_wins_over_errors_that_follow_it(self, tmp_path):
        found = self.judge(tmp_path, [view(0, 1, "error", "odd", 101.0), view(1, vanished=True)], 247)
        assert found.status == 1 and "rank 1 was killed (SIGKILL" in found.message

    def test_an_error_wins_over_a_rank_that_vanished_later(self, tmp_path):
        found = self.judge(tmp_path, [view(0, 5, "error", "nan", 100.0), view(1, at=103.0, vanished=True)])
        assert found.status == 5

    def test_signals_from_the_launchers_own_report(self, tmp_path):
        (tmp_path / "launcher.log").write_text("  exitcode  : -11 (pid: 1001)\n  exitcode  : -9 (pid: 77)\n")
        found = self.judge(tmp_path, [view(0, 1, "connection"), view(1, vanished=True)], 1, "torchrun")
        assert "SIGSEGV" in found.message

    @pytest.mark.parametrize(
        "log", ["  exitcode  : 7 (pid: 1001)\n", "failed (exitcode: 7) local_rank: 1 (pid: 1001) of"]
    )
    def test_a_status_from_torchruns_report_is_no_kill(self, tmp_path, log):
        (tmp_path / "launcher.log").write_text(log)
        found = self.judge(tmp_path, [view(0, 1, "connection"), view(1, vanished=True)], 1, "torchrun")
        assert found.status == 1 and "rank 1 ended by itself with status 7" in found.message
        assert found.from_outside and "SIGKILL" not in found.message

    def test_a_status_that_may_be_another_ranks_is_not_told_as_this_ones(self, tmp_path):
        found = self.judge(tmp_path, [view(0, 1, "connection"), view(1, vanished=True)], 1, "deepspeed")
        assert "rank 1 ended without a word" in found.message

    def test_a_rank_that_only_the_front_could_end_is_named_beside_the_time_out_of_its_peer(self, tmp_path):
        late = view(0, 1, "connection", "Timed out waiting 5000ms")
        found = self.judge(tmp_path, [late, view(1, vanished=True, killed=True)], None)
        assert "rank 1 did not answer, at step 9 during backward, and was killed" in found.message
        own = view(0, 5, "error", "nan")
        assert "did not answer" not in self.judge(tmp_path, [own, view(1, vanished=True, killed=True)]).message

    def test_memory_kills_of_the_kernel_are_told(self, tmp_path):
        found = self.judge(tmp_path, [view(0, 1, "connection"), view(1, vanished=True)], 247, memory=1)
        assert found.status == 4 and "memory ran out" in found.message

    def test_a_rank_that_the_front_killed_is_not_the_cause(self, tmp_path):
        ranks = [view(0, vanished=True, killed=True), view(1, 5, "error", "nan")]
        assert self.judge(tmp_path, ranks).status == 5
        found = self.judge(tmp_path, [view(0, vanished=True, killed=True), view(1, 130)])
        assert found.status == 1 and "rank 0 did not stop in time" in found.message

    def test_ranks_that_the_front_killed_after_their_launcher_are_not_the_cause(self, tmp_path):
        ranks = [view(0, vanished=True, killed=True), view(1, vanished=True, killed=True)]
        found = self.judge(tmp_path, ranks, -9)
        assert found.status == 1 and "it was killed (SIGKILL)" in found.message
        assert "rank 0 did not stop in time" in self.judge(tmp_path, ranks, None).message

    def test_every_known_status_is_passed_on(self, tmp_path):
        for error in (RecipeError("x"), MachineError("x"), OutOfMemory("x"), NonFiniteLoss("x"), CamshaftError("x")):
            status, kind = exits.classify(error)
            assert self.judge(tmp_path, [view(0, status, kind, "x"), view(1)]).status == error.exit_status
        assert self.judge(tmp_path, [view(0, 77, "error", "x"), view(1)]).status == 1
