"""Time by kind of work, by operation and by phase, in traces with known times."""

import json

import pytest
from profile_traces import Writer

from camshaft.profiling.findings import examine, plain_seconds
from camshaft.profiling.report import _overhead
from camshaft.profiling.times import phases, ranges, spent


def host_trace():
    writer = Writer()
    writer.range("camshaft/window", 0, 1000)
    writer.range("camshaft/phase/data", 0, 50)
    writer.host("aten::copy_", 10, 40)
    writer.range("camshaft/phase/forward", 100, 400)
    writer.range("camshaft/module/model.layers.0.self_attn", 110, 350)
    writer.range("zero.gather", 112, 118)
    writer.host("aten::linear", 120, 200)
    writer.host("aten::mm", 130, 190)
    writer.host("aten::scaled_dot_product_attention", 210, 300, **{"Sequence number": 3})
    writer.host("aten::bmm", 220, 280, **{"Sequence number": 4})
    writer.range("camshaft/phase/backward", 400, 800)
    writer.host("autograd::engine::evaluate_function: BmmBackward0", 410, 500, **{"Sequence number": 4})
    writer.host("aten::bmm", 420, 490)
    writer.host("autograd::engine::evaluate_function: MulBackward0", 500, 520, **{"Sequence number": 9})
    writer.host("PythonDispatchMode", 530, 540)
    writer.host("aten::mul", 505, 515)
    writer.range("camshaft/wait/ddp/post_backward/all_reduce/dp", 600, 700)
    writer.range("camshaft/blocked", 610, 690)
    writer.range("camshaft/phase/optimizer", 800, 900)
    writer.host("aten::_fused_adamw_", 810, 890)
    writer.host("aten::mm", 300, 400, thread=2)  # another thread
    writer.range("zero.gather", 1010, 1090)  # behind the window
    writer.host("aten::mm", 1020, 1080)
    return writer


def test_kinds_of_work_and_idle_time_add_up_to_the_window():
    found = spent(host_trace().trace())
    assert found.window == 1000
    assert found.groups == {
        "matrix products": 60 + 20,
        "attention": 30 + 60 + 20 + 70,
        "norms and elementwise": 10,
        "optimizer": 80,
        "communication": 80,
        "data": 50,
        "other": 10 + 10,
        "idle": 1000 - (80 + 90 + 90 + 20 + 10 + 80 + 80 + 50),
    }
    assert sum(found.groups.values()) == pytest.approx(1000)
    assert found.operations["matrix products", "aten::mm"] == (60, 1)
    assert found.operations["attention", "aten::bmm"] == (130, 2)
    assert found.operations["communication", "wait ddp/post_backward/all_reduce/dp"] == (80, 1)


def test_phases_and_the_rest_add_up_to_the_window():
    found = phases(host_trace().trace())
    assert found == {"data": 50, "forward": 300, "backward": 400, "optimizer": 100, "other": 150}


def test_ranges_of_plugins_are_told_and_ours_are_not():
    assert ranges(host_trace().trace()) == {"zero.gather": (6, 1)}


def test_kernels_are_told_by_their_launcher_and_by_their_name():
    writer = Writer()
    writer.range("camshaft/window", 0, 1000)
    writer.range("camshaft/phase/forward", 0, 100)
    product = writer.host("aten::mm", 0, 10)
    attention = writer.host("aten::_flash_attention_forward", 10, 20)
    norm = writer.host("aten::rms_norm", 20, 30)
    compiled = writer.host("CompiledFunction", 30, 60)
    writer.range("camshaft/phase/optimizer", 100, 200)
    step = writer.host("aten::_foreach_add_", 110, 120)
    writer.kernel("sm90_xmma_gemm", 100, 300, 7, product)
    writer.kernel("pytorch_flash::flash_fwd_kernel", 300, 350, 7, attention)
    writer.kernel("vectorized_layer_norm_kernel", 350, 360, 7, norm)
    writer.kernel("triton_poi_fused_mul", 360, 380, 7, compiled)
    writer.kernel("nvjet_tst_128x256", 380, 400, 7, compiled)
    writer.kernel("multi_tensor_apply_kernel", 500, 600, 7, step)
    writer.kernel("ncclDevKernel_AllReduce", 350, 700, 20)
    writer.kernel("Memcpy DtoD", 900, 1200, 7, kind="gpu_memcpy")  # cut at the window's end
    found = spent(writer.trace())
    assert found.groups == {
        "matrix products": 220,
        "attention": 50,
        "norms and elementwise": 30 + 100,
        "optimizer": 100,
        "communication": 350,
        "data": 0,
        "other": 0,
        "idle": 100 + 200,
    }
    assert found.operations["norms and elementwise", "aten::rms_norm"] == (10, 1)
    assert found.operations["communication", "ncclDevKernel_AllReduce"] == (350, 1)


def test_findings_are_of_one_window(tmp_path):
    """Two windows and what is between them: times are milliseconds a window."""
    writer = Writer()
    for start in (0, 5000):
        writer.range("camshaft/window", start, start + 1000)
        writer.range("camshaft/phase/forward", start, start + 600)
        writer.host("aten::mm", start + 100, start + 300)
        writer.range("camshaft/blocked", start + 400, start + 450)
        writer.range("a.range", start + 500, start + 510)
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(writer.document))
    found = examine(path, [], [])
    assert (found["windows"], found["window_ms"]) == (2, 1.0)
    assert found["phases_ms"] == pytest.approx({"forward": 0.6, "other": 0.4})
    assert found["groups_ms"]["matrix products"] == pytest.approx(0.2)
    assert found["operations"][0] == {"group": "matrix products", "name": "aten::mm", "ms": 0.2, "calls": 1}
    assert found["ranges"] == [{"name": "a.range", "ms": 0.01, "calls": 1}]
    assert found["communication"]["exposed_ms"] == found["communication"]["under_way_ms"] == 0.05
    assert found["communication"]["exposed_by_owner_ms"] == {"another library": 0.05}


def test_what_seems_to_end_after_what_it_is_in_is_cut():
    """Clocks of a trace round: else the next on the track would count as inside of it."""
    writer = Writer()
    writer.range("camshaft/window", 0, 1000)
    writer.host("aten::linear", 100, 200)
    writer.host("aten::mm", 150, 201)
    writer.host("aten::mul", 200, 300)
    found = spent(writer.trace())
    assert found.groups["matrix products"] == 50 + 50 and found.groups["norms and elementwise"] == 100
    assert sum(found.groups.values()) == found.window == 1000


def test_the_first_window_does_not_tell_the_profilers_cost():
    assert plain_seconds([]) is None and plain_seconds([9.0]) is None
    assert plain_seconds([9.0, 1.0, 3.0, 2.0]) == 2.0
    assert plain_seconds([9.0, 50.0, 1.0]) == 1.0, "the second window compiled, and three are what is run by default"


@pytest.mark.parametrize(
    ("plain", "words"),
    [
        (None, "two warm-up windows"),
        (80.0, "80.00 ms without: it costs 25.0 %"),
        (110.0, "less than windows differ"),
        (900.0, "raise --warmup"),
    ],
)
def test_what_the_profiler_costs_is_said_or_why_it_is_unknown(plain, words):
    assert words in _overhead({"window_ms": 100.0, "plain_window_ms": plain})
