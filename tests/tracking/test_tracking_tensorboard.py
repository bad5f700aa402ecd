from __future__ import annotations

import sys

import pytest
from tracking_records import eval_record, train_record

from camshaft_tensorboard import Options, Plugin


def _run(state, records, **options):
    plugin = Plugin(Options(**options))
    plugin.pre_run(state)
    for record in records:
        plugin.log(state, record)
    plugin.close(state, "finished")


def _read(folder):
    """Scalars as TensorBoard itself shows them: {name: [(step, value), ...]}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_reads_back_names_steps_and_values(make_state):
    state = make_state()
    _run(state, [train_record(10), train_record(20), eval_record(20)])
    found = _read(state.world.run.path / "tensorboard")
    metrics = {*train_record(10), *eval_record(20)} - {"progress/global_step"}
    assert set(found) == metrics
    assert [step for step, _ in found["train/loss"]] == [10, 20]
    assert found["train/loss"][1][1] == pytest.approx(train_record(20)["train/loss"], rel=1e-6)
    assert found["eval/loss"] == [(20, 4.5)]


def test_a_resume_hides_what_the_run_repeats(make_state):
    _run(make_state(), [train_record(step) for step in (10, 20, 30, 40)])
    state = make_state(step=20)
    _run(state, [train_record(30, **{"train/loss": 7.0})])
    assert [step for step, _ in _read(state.world.run.path / "tensorboard")["train/loss"]] == [10, 20, 30]


def test_a_start_from_nothing_in_a_used_directory_hides_everything_before(make_state):
    _run(make_state(), [eval_record(0), train_record(10)])
    state = make_state(step=0)
    _run(state, [eval_record(0), train_record(5)])
    found = _read(state.world.run.path / "tensorboard")
    assert [step for step, _ in found["train/loss"]] == [5]
    assert found["eval/loss"] == [(0, 4.5)]


def test_the_folder_is_an_option_that_starts_at_the_run_directory(make_state):
    state = make_state()
    _run(state, [train_record(10)], dir="tb")
    assert "train/loss" in _read(state.world.run.path / "tb")


def test_other_ranks_write_nothing(make_state):
    state = make_state(is_main=False)
    _run(state, [train_record(10)])
    assert list(state.world.run.path.iterdir()) == []


def test_an_absent_package_is_said_once_with_its_fix_and_training_goes_on(make_state, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    _run(make_state(), [train_record(10), train_record(20)])
    assert len(caplog.records) == 1
    assert "pip install 'camshaft[tensorboard]'" in caplog.text


def test_a_folder_that_cannot_be_made_is_said_once(make_state, caplog):
    state = make_state()
    (state.world.run.path / "tensorboard").write_text("in the way")
    _run(state, [train_record(10), train_record(20)])
    assert len(caplog.records) == 1
    assert "TensorBoard is off" in caplog.text


def test_a_writer_that_fails_is_counted_and_never_raises(make_state, monkeypatch, caplog):
    plugin = Plugin()
    state = make_state()
    plugin.pre_run(state)
    real_close = plugin._writer.close

    def broken(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(plugin._writer, "add_scalar", broken)
    for step in (10, 20, 30):
        plugin.log(state, train_record(step))
    plugin.close(state, "finished")
    real_close()
    assert "TensorBoard lost a record: OSError: disk full" in caplog.text
    assert "TensorBoard failed 3 times" in caplog.text
