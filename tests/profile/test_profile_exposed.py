"""Intervals, and exposed communication of traces with known times."""

import random

import pytest
from profile_traces import Writer

from camshaft.profiling.exposed import exposed
from camshaft.profiling.intervals import clip, length, subtract, union
from camshaft.profiling.trace import parse


def points(intervals):
    return {point for start, end in intervals for point in range(start, end)}


@pytest.mark.parametrize("seed", range(50))
def test_intervals_are_sets_of_points(seed):
    chooser = random.Random(seed)

    def some():
        found = []
        for _ in range(chooser.randint(0, 8)):
            start = chooser.randint(0, 40)
            found.append((start, start + chooser.randint(0, 10)))
        return found

    left, right = some(), some()
    assert points(union(left)) == points(left)
    assert all(before[1] < after[0] for before, after in zip(union(left), union(left)[1:], strict=False))
    assert points(subtract(union(left), union(right))) == points(left) - points(right)
    assert points(clip(left, union(right))) == points(left) & points(right)
    assert length(union(left)) == len(points(left))


def test_on_a_device_exposed_is_what_no_other_kernel_covers():
    writer = Writer()
    writer.range("camshaft/window", 0, 1000)
    writer.range("camshaft/start/ddp/post_backward/all_reduce/dp", 10, 20)
    reduce = writer.host("c10d::allreduce_", 12, 18)
    writer.range("camshaft/start/zero/pre_forward/all_gather/dp", 30, 40)
    gather = writer.host("c10d::_allgather_base_", 32, 38)
    compute = writer.host("aten::mm", 50, 60)
    writer.kernel("ncclDevKernel_AllReduce_Sum_f32_RING_LL(...)", 100, 300, 20, reduce)
    writer.kernel("ncclDevKernel_AllGather_RING_LL(...)", 280, 400, 24, gather)
    writer.kernel("sm90_xmma_gemm_bf16", 50, 150, 7, compute)  # hides 100 to 150
    writer.kernel("void at::native::vectorized_elementwise_kernel", 200, 290, 7, compute)  # hides 200 to 290
    writer.kernel("ncclDevKernel_SendRecv(...)", 950, 1100, 28)  # ends after the window; nobody is known
    found = exposed(writer.trace())
    assert found.under_way == 300 + 50
    assert found.exposed == (50 + 110) + 50
    assert found.by_owner == {
        "ddp/post_backward/all_reduce/dp": 50 + 10,
        "zero/pre_forward/all_gather/dp": 110,
        "another library": 50,
    }


def test_on_a_cpu_exposed_is_the_time_that_the_thread_waits_or_starts_something():
    writer = Writer()
    writer.range("camshaft/window", 0, 1000)
    writer.range("gloo:all_reduce", 100, 500, thread=5)
    writer.range("camshaft/start/ddp/post_backward/all_reduce/dp", 100, 110)
    writer.host("c10d::allreduce_", 102, 107)
    writer.host("aten::mm", 120, 300)  # the sum travels meanwhile
    writer.range("camshaft/wait/ddp/post_backward/all_reduce/dp", 350, 520)
    writer.range("camshaft/blocked", 351, 500)
    writer.host("aten::add", 501, 515)  # sums up inside of the wait: computation
    writer.host("aten::mul", 400, 420, thread=7)  # another thread of this rank computes meanwhile
    writer.host("autograd::engine::evaluate_function: MmBackward0", 600, 800)
    writer.range("camshaft/blocked", 650, 700)  # a hook inside of the backward waits for another library's collective
    found = exposed(writer.trace())
    assert found.exposed == 5 + (149 - 20) + 50
    assert found.by_owner == {"ddp/post_backward/all_reduce/dp": 134, "another library": 50}
    assert found.under_way == 400 + 50


def test_without_collectives_nothing_is_exposed():
    writer = Writer()
    writer.range("camshaft/window", 0, 10)
    writer.host("aten::mm", 1, 9)
    found = exposed(writer.trace())
    assert (found.under_way, found.exposed, found.by_owner) == (0, 0, {})


def test_what_is_outside_of_the_windows_does_not_count():
    writer = Writer()
    for start in (0, 1000):
        writer.range("camshaft/window", start, start + 500)
        writer.range("camshaft/blocked", start + 400, start + 450)
    writer.range("camshaft/blocked", 600, 900)
    assert exposed(writer.trace()).exposed == 100


@pytest.mark.parametrize("document", [{}, {"traceEvents": []}, {"traceEvents": "?"}])
def test_what_is_no_trace_of_ours_is_refused(document):
    with pytest.raises(ValueError, match="in it"):
        parse(document)
