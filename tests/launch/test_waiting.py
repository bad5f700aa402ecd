"""Which rank a collective waited for, told by where the ranks were."""

import os

import pytest

from camshaft.cli.launch import heartbeat
from camshaft.cli.launch.waiting import explain
from camshaft.errors import PluginError

LATE = RuntimeError("[gloo/transport/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv operation to complete")


def beats(folder, *progress):
    path = folder / "heartbeat"
    heartbeat.create(path, len(progress))
    for rank, place in enumerate(progress):
        heart = heartbeat.Heartbeat()
        heart.beat(*place)
        heart.attach(path, rank)
    return path


@pytest.mark.parametrize(
    ("own", "other"),
    [
        ((3, "reduce"), (3, "backward")),
        ((3, "backward"), (3, "forward")),
        ((4, "data"), (4, "save")),
        ((4, "backward"), (4, "log")),
        ((4, "log"), (3, "optimizer")),
        ((0, "build"), (0, "start")),
    ],
)
def test_the_rank_that_is_behind_is_named_whatever_the_phase_codes_are(tmp_path, own, other):
    path = beats(tmp_path, own, other, own)
    text = explain(LATE, path, 0)
    assert text.startswith(f"a collective waited 1800 s in vain: rank 1 has been at step {other[0]} during ")
    assert "rank 2" not in text and explain(LATE, path, 1) == ""


def test_the_error_may_be_wrapped_and_others_are_left_alone(tmp_path):
    path = beats(tmp_path, (3, "reduce"), (3, "data"), (2, "save"))
    wrapped = PluginError("ddp", "reduce", "it failed")
    wrapped.__cause__ = LATE
    assert "rank 1 has been at step 3 during data since then, rank 2 has been at step 2 during save" in explain(
        wrapped, path, 0
    )
    assert explain(RuntimeError("Connection closed by peer"), path, 0) == ""
    assert explain(LATE, tmp_path / "none", 0) == "" and os.path.exists(path)
