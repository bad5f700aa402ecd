"""Whose memory it is: in a trace with known blocks, and in one of a real model with a known largest tensor."""

import time
from collections import OrderedDict

import pytest
import torch
from profile_traces import Writer
from torch.profiler import ProfilerActivity, profile, record_function

from camshaft.profiling.memory import Held, owners, thin, timeline
from camshaft.profiling.ranges import Modules
from camshaft.profiling.trace import read

HELD = [Held(1, 1000, "parameter", "w"), Held(2, 2000, "optimizer state", "exp_avg of w")]


def window(device=0):
    writer = Writer()
    writer.memory(-5, 99, 7, 3007, device)  # allocated between the look at what is held and the window
    writer.range("camshaft/window", 0, 1000)
    writer.range("camshaft/phase/forward", 0, 400)
    for layer in (0, 1):
        start = 10 + 100 * layer
        writer.range(f"camshaft/module/model.layers.{layer}", start, start + 80)
        writer.host("aten::linear", start + 10, start + 50, **{"Sequence number": layer})
        writer.host("aten::mm", start + 20, start + 40)
        writer.memory(start + 30, 10 + layer, 500, 3507 + 500 * layer, device)
    writer.range("camshaft/phase/backward", 400, 700)
    writer.host("autograd::engine::evaluate_function: MmBackward0", 410, 500, **{"Sequence number": 1})
    writer.host("aten::mm", 420, 480)
    writer.memory(430, 20, 1000, 5007, device)  # the gradient
    writer.memory(440, 21, 300, 5307, device)  # the peak
    writer.memory(490, 21, -300, 5007, device)
    writer.memory(510, 10, -500, 4507, device)
    writer.memory(511, 11, -500, 4007, device)
    writer.range("camshaft/phase/clip", 700, 720)
    writer.memory(710, 30, 4, 4011, device)
    writer.memory(715, 30, -4, 4007, device)
    writer.range("camshaft/phase/optimizer", 720, 900)
    writer.memory(880, 20, -1000, 3007, device)
    return writer


def test_every_byte_at_the_peak_has_its_owner():
    found = timeline(window().trace(), HELD, [{20: "w", 1: "a gradient that is kept where the parameter was"}])
    assert (found.device, found.before, found.peak, found.peak_time, found.peak_phase) == (
        "cpu",
        3007,
        5307,
        440,
        "backward",
    )
    assert found.by_category == {
        "parameter": 1000, "optimizer state": 2000, "temporary": 307, "activation": 1000, "gradient": 1000,
    }  # fmt: skip
    assert [(each.category, each.name, each.size, each.count) for each in found.owners] == [
        ("optimizer state", "exp_avg of w", 2000, 1),
        ("activation", "model.layers.* aten::linear", 1000, 2),
        ("gradient", "w", 1000, 1),
        ("parameter", "w", 1000, 1),
        ("temporary", "model.layers.1 aten::mm (backward)", 300, 1),
        ("temporary", "other (other)", 7, 1),
    ]
    assert found.phases == {"forward": 4007, "backward": 5307, "clip": 4011, "optimizer": 3007}


def test_on_a_device_the_allocators_total_counts_and_what_nobody_explains_is_said():
    writer = window(device=1)
    for event in writer.events:
        if event["ph"] == "i":
            event["args"]["Total Allocated"] += 100  # a library's workspace
    writer.memory(441, 77, 10**9, 10**9)  # the host's memory is not the device's
    found = timeline(writer.trace(), HELD, [{20: "w"}])
    assert (found.device, found.before, found.peak) == ("cuda", 3107, 5407)
    assert found.by_category["unknown"] == 100


def test_an_address_that_is_given_out_again_had_been_freed():
    writer = Writer()
    writer.range("camshaft/window", 0, 100)
    writer.memory(10, 2, 50)  # the block of 2,000 bytes that was held there has gone without an event
    found = timeline(writer.trace(), HELD)
    assert found.peak == sum(found.by_category.values()) == 1050


def test_no_peak_is_lost_in_the_thinned_course():
    course = [(float(place), place % 1000) for place in range(5000)]
    course[2345] = (2345.0, 10**6)
    found = thin(course)
    assert len(found) <= 401 and (2345.0, 10**6) in found and found == sorted(found)


def test_names_without_numbers_are_left_alone():
    blocks = timeline(
        window().trace(), [Held(1, 5, "parameter", "a.0.b and 3 more"), Held(2, 6, "parameter", "a.11.b and 3 more")]
    ).owners
    assert ("parameter", "a.*.b and 3 more", 11, 2) in [
        (each.category, each.name, each.size, each.count) for each in blocks
    ]
    assert owners([]) == []


@pytest.fixture
def recorded(tmp_path):
    """One window of a toy: its largest activation, temporary and parameter are known."""
    torch.manual_seed(0)
    layers = {"wide": torch.nn.Linear(64, 4096, bias=False), "narrow": torch.nn.Linear(4096, 8, bias=False)}
    model = torch.nn.Sequential(OrderedDict(layers))
    modules = Modules(model)
    modules.on = True
    names = {}
    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler,
        record_function("camshaft/window"),
    ):
        with record_function("camshaft/phase/forward"):
            loss = model(torch.ones(256, 64)).sum()
        with record_function("camshaft/phase/backward"):
            loss.backward()
        names = {each.grad.untyped_storage().data_ptr(): name for name, each in model.named_parameters()}
        with record_function("camshaft/phase/clip"):
            torch.ones(4).sum()
    modules.remove()
    path = tmp_path / "trace.json"
    profiler.export_chrome_trace(str(path))
    held = [
        Held(each.untyped_storage().data_ptr(), each.untyped_storage().nbytes(), "parameter", name)
        for name, each in model.named_parameters()
    ]
    return model, timeline(read(path), held, [names])


def test_the_largest_tensor_of_a_real_window_is_found(recorded):
    model, found = recorded
    hidden = 256 * 4096 * 4
    by_name = {(each.category, each.name): each.size for each in found.owners}
    assert by_name["activation", "wide aten::linear"] == hidden
    assert by_name["temporary", "narrow aten::mm (backward)"] == pytest.approx(hidden, rel=0.01)  # its gradient
    assert by_name["parameter", "wide.weight"] == 64 * 4096 * 4
    assert {each.name for each in found.owners[:2]} == {"wide aten::linear", "narrow aten::mm (backward)"}
    assert found.peak_phase == "backward"
    assert 2 * hidden <= found.peak <= 2 * hidden + 4 * 2**20
    assert not any(vars(module).get("_forward_hooks") for module in model.modules())


def test_a_window_without_allocations_holds_what_was_there():
    writer = Writer()
    writer.range("camshaft/window", 0, 10)
    found = timeline(writer.trace(), HELD)
    assert (found.before, found.peak, found.by_category) == (3000, 3000, {"parameter": 1000, "optimizer state": 2000})
    assert [each.size for each in found.owners] == [2000, 1000]


def test_blocks_that_grow_in_number_cost_no_more_each():
    """Every allocation is a new peak here: what is held may not be copied at each."""

    def seconds(count):
        writer = Writer()
        writer.range("camshaft/window", 0, count)
        for number in range(count):
            writer.memory(number, 10 + number, 8)
        trace = writer.trace()
        began = time.process_time()
        assert timeline(trace, HELD).peak == 3000 + 8 * count
        return time.process_time() - began

    few = min(seconds(2_000) for _ in range(3))
    assert seconds(40_000) < 20 * few * 8
