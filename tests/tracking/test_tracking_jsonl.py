from __future__ import annotations

import json
import math
import os
import random
import signal
import struct
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from tracking_records import eval_record, train_record

from camshaft.host import Host
from camshaft_jsonl import Options, Plugin
from camshaft_jsonl.writer import Writer, cut, encode


def _read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _steps(path: Path) -> list[int]:
    return [record["progress/global_step"] for record in _read(path)]


def _run(state, records, status="finished"):
    plugin = Plugin()
    plugin.pre_run(state)
    for record in records:
        plugin.log(state, record)
    plugin.close(state, status)


def test_the_host_takes_every_hook():
    hooks = {hook for hook in ("plan", "pre_run", "log", "close") if Host({"jsonl": Plugin()}).implementations(hook)}
    assert hooks == {"plan", "pre_run", "log", "close"}
    assert Plugin().plan().claims == ()


def test_one_object_a_record_with_the_metric_names_as_keys(make_state):
    state = make_state()
    before = time.time()
    _run(state, [train_record(10), eval_record(10)])
    train, evaluation = _read(state.world.run.metrics)
    assert before <= train.pop("time") <= time.time()
    assert train == train_record(10)
    assert set(evaluation) == {*eval_record(10), "time"}


def test_other_ranks_write_nothing(make_state):
    state = make_state(is_main=False)
    _run(state, [train_record(10)])
    assert not state.world.run.metrics.exists()


def test_every_float64_reads_back_as_the_same_bits():
    rng = random.Random(0)
    values = [struct.unpack("<d", rng.randbytes(8))[0] for _ in range(2000)]
    values = [value for value in values if math.isfinite(value)] + [-0.0, 5e-324, 0.1 + 0.2, 2.0**53 + 2]
    read = json.loads(encode({str(index): value for index, value in enumerate(values)}))
    assert [struct.pack("<d", value) for value in read.values()] == [struct.pack("<d", value) for value in values]


def test_integers_stay_integers_of_any_size():
    assert json.loads(encode({"progress/consumed_tokens": 10**17 + 1}))["progress/consumed_tokens"] == 10**17 + 1


def test_values_that_are_not_finite_are_strings_that_float_reads():
    read = json.loads(encode({"a": math.nan, "b": math.inf, "c": -math.inf}))
    assert read == {"a": "nan", "b": "inf", "c": "-inf"}
    assert math.isnan(float(read["a"])) and float(read["c"]) == -math.inf


def test_a_line_is_in_the_file_before_log_returns(make_state):
    state = make_state()
    plugin = Plugin()
    plugin.pre_run(state)
    plugin.log(state, train_record(10))
    assert _steps(state.world.run.metrics) == [10]
    plugin.close(state, "failed")


def test_a_resume_cuts_what_the_run_repeats_and_keeps_the_rest_byte_for_byte(make_state):
    state = make_state()
    _run(state, [record for step in (10, 20, 30, 40) for record in (train_record(step), eval_record(step))])
    kept = state.world.run.metrics.read_bytes().splitlines(keepends=True)[:4]
    state = make_state(step=20)
    _run(state, [train_record(30), train_record(40)])
    assert _steps(state.world.run.metrics) == [10, 10, 20, 20, 30, 40]
    assert state.world.run.metrics.read_bytes().splitlines(keepends=True)[:4] == kept


def test_a_start_from_nothing_in_a_used_directory_starts_a_new_file(make_state):
    _run(make_state(), [eval_record(0), train_record(10)])
    state = make_state(step=0)
    _run(state, [eval_record(0), train_record(10)])
    assert _steps(state.world.run.metrics) == [0, 10]


def test_what_is_cut_is_kept_beside_the_file_in_the_order_of_the_cuts(make_state, caplog):
    """A run that starts anew by mistake in the directory of a finished one must not cost its record."""
    _run(make_state(), [train_record(10), train_record(20), train_record(30)])
    lines = make_state().world.run.metrics.read_bytes().splitlines(keepends=True)
    _run(make_state(step=20), [])
    _run(make_state(step=0), [train_record(10)])
    metrics = make_state().world.run.metrics
    assert metrics.with_name("metrics.cut.jsonl").read_bytes() == lines[2] + lines[0] + lines[1]
    assert _steps(metrics) == [10]
    assert "1 line(s) after step 20 cut and kept in metrics.cut.jsonl" in caplog.text


def test_lines_that_cannot_be_kept_are_not_cut(make_state, caplog):
    _run(make_state(), [train_record(10)])
    metrics = make_state().world.run.metrics
    before = metrics.read_bytes()
    metrics.with_name("metrics.cut.jsonl").mkdir()
    _run(make_state(step=0), [train_record(10)])
    assert metrics.read_bytes() == before
    assert "cannot be written" in caplog.text


@pytest.mark.parametrize(
    "torn", [b'{"train/loss":5.1,"progress/glo', b"\xff\xfe", b'{"a":1}\n[1]\n', b'{"progress/global_step":"x"}']
)
def test_an_incomplete_line_is_dropped_and_said(make_state, caplog, torn):
    state = make_state()
    _run(state, [train_record(10)])
    metrics = state.world.run.metrics
    metrics.write_bytes(metrics.read_bytes() + torn)
    state = make_state(step=10)
    _run(state, [train_record(20)])
    assert [record["progress/global_step"] for record in _read(metrics) if "progress/global_step" in record] == [10, 20]
    assert "1 incomplete line(s) dropped" in caplog.text


def test_a_last_line_that_lacks_only_its_end_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(encode(train_record(10)).rstrip(b"\n"))
    assert cut(path, 10) == ""
    assert path.read_bytes() == encode(train_record(10))


def test_a_file_that_needs_no_cut_is_not_replaced(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(encode(train_record(10)))
    before = path.stat().st_ino
    assert cut(path, 10) == ""
    assert path.stat().st_ino == before
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_killed_writer_leaves_whole_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    script = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from camshaft_jsonl.writer import Writer
        writer = Writer(Path(sys.argv[1]), fsync_every_s=0.05)
        for step in range(10**9):
            writer.write({"train/loss": 1 / 3, "progress/global_step": step})
        """
    )
    with subprocess.Popen([sys.executable, "-c", script, str(path)]) as process:
        deadline = time.monotonic() + 20
        while not (path.exists() and path.stat().st_size > 100_000) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    steps = _steps(path)
    assert len(steps) > 1000
    assert steps == list(range(len(steps)))
    assert "cut" in cut(path, 500)
    assert _steps(path) == list(range(501))


def test_a_full_disk_costs_lines_and_a_warning_but_not_the_run(make_state, monkeypatch, caplog):
    state = make_state()
    plugin = Plugin()
    plugin.pre_run(state)
    plugin.log(state, train_record(10))
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, data: real(file, data[:7]))  # what a disk does when it fills up
    plugin.log(state, train_record(20))
    plugin.log(state, train_record(30))
    monkeypatch.undo()
    plugin.log(state, train_record(40))
    plugin.close(state, "finished")
    assert _steps(state.world.run.metrics) == [10, 40]
    assert caplog.text.count("writing to") == 2
    assert "failed 2 times" in caplog.text


def test_a_directory_that_cannot_be_written_is_said_once(make_state, caplog):
    state = make_state()
    state.world.run.metrics = state.world.run.path / "file" / "metrics.jsonl"
    (state.world.run.path / "file").write_text("in the way")
    _run(state, [train_record(10), train_record(20)])
    assert caplog.text.count("keeps no metrics file") == 1


def test_a_value_that_is_no_number_costs_its_line_only(make_state, caplog):
    state = make_state()
    _run(state, [train_record(10, **{"plugin/x/y": None}), train_record(20)])
    assert _steps(state.world.run.metrics) == [20]
    assert "failed" in caplog.text


def test_fsync_happens_at_its_interval_and_at_the_end(tmp_path, monkeypatch):
    calls: list[int] = []
    monkeypatch.setattr(os, "fsync", calls.append)
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    writer = Writer(tmp_path / "metrics.jsonl", fsync_every_s=30)
    for moment in (10.0, 29.0, 31.0, 40.0, 62.0):
        now[0] = moment
        writer.write(train_record(1))
    assert len(calls) == 2
    writer.close()
    assert len(calls) == 3


def test_options_are_checked():
    with pytest.raises(ValueError, match="fsync_every_s"):
        Options(fsync_every_s=-1)
