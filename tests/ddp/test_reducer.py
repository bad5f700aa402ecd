"""The reducer of ddp against sums made in one process: unused, tied, frozen, uneven and mixed parameters."""

import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from camshaft.comm import Channel
from camshaft.testing.ranks import RankFailed, run_ranks
from camshaft_ddp import reducer as reducer_module
from camshaft_ddp.bucket import ALIGNMENT, fill
from camshaft_ddp.reducer import Reducer


class Toy(nn.Module):
    """Odd sizes, a tied weight, a frozen one, one in another dtype, and branches that a call may leave out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(7, 15, dtype=torch.float64)
        self.second = nn.Linear(15, 7, bias=False, dtype=torch.float64)
        self.tied = nn.Linear(15, 7, bias=False, dtype=torch.float64)
        self.tied.weight = self.second.weight
        self.frozen = nn.Parameter(torch.ones(3, dtype=torch.float64), requires_grad=False)
        self.narrow = nn.Parameter(torch.ones(5, dtype=torch.float32))
        self.branch = nn.ParameterList([nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2)])
        self.never = nn.Parameter(torch.ones(2, 3, dtype=torch.float64))

    def forward(self, x, branch):
        hidden = torch.tanh(self.first(x))
        out = self.second(hidden) + self.tied(hidden * 2)
        total = (out**2).sum() + (self.narrow.double() * x[0, :5]).sum() + self.frozen.sum()
        return total if branch is None else total + (self.branch[branch] ** 2).sum() * x.sum()


def inputs(rank, microbatch):
    """Another number of rows each time; branch 0 on rank 0 only, branch 1 in the last microbatch of the others only."""
    generator = torch.Generator().manual_seed(10 * rank + microbatch)
    x = torch.randn(1 + rank + 2 * microbatch, 7, generator=generator, dtype=torch.float64)
    return x, (0 if rank == 0 else (1 if microbatch == 2 else None))


def expected(world_size, microbatches):
    """Gradients of one process over everything."""
    model = Toy()
    for rank in range(world_size):
        for microbatch in range(microbatches):
            model(*inputs(rank, microbatch)).backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def make(model, world_size, bucket_bytes=600, overlap=True, dtype=torch.float64):
    world = SimpleNamespace(stages={}, mesh=SimpleNamespace(degree=lambda axis: 1))
    state = SimpleNamespace(model=model, world=world, stage=0, final_backward=False)
    channel = Channel(torch.distributed.group.WORLD, "ddp", "dp") if world_size > 1 else None
    return state, Reducer(state, channel, bucket_bytes=bucket_bytes, overlap=overlap, reduce_dtype=dtype)


def window(state, reducer, rank, microbatches):
    for microbatch in range(microbatches):
        loss = state.model(*inputs(rank, microbatch))
        state.final_backward = microbatch == microbatches - 1
        loss.backward()
        reducer.end_backward()
    reducer.finish()
    return {name: None if p.grad is None else p.grad.clone() for name, p in state.model.named_parameters()}


def three_windows(rank, world_size, microbatches, bucket_bytes, overlap):
    state, reducer = make(Toy(), world_size, bucket_bytes, overlap)
    reducer._dtype = torch.float64
    seen = []
    for _ in range(3):
        seen.append(window(state, reducer, rank, microbatches))
        reducer.release()
        assert all(p.grad is None for p in state.model.parameters())
    order = reducer.order
    reducer.close()
    state.model(*inputs(rank, 0)).backward()
    assert not reducer.buckets
    return seen, order


@pytest.mark.parametrize(("world_size", "microbatches"), [(2, 1), (2, 3), (4, 3)])
@pytest.mark.parametrize("bucket_bytes", [1, 600, 1 << 20])
def test_gradients_equal_one_process_in_every_window(world_size, microbatches, bucket_bytes):
    wanted = expected(world_size, microbatches)
    results = run_ranks(world_size, three_windows, microbatches, bucket_bytes, True)
    for seen, _ in results:
        for gradients in seen:
            for name, gradient in gradients.items():
                if wanted[name] is None:
                    assert gradient is None, name
                else:
                    bound = 1e-12 if gradient.dtype == torch.float64 else 1e-6  # the noise of sums in either dtype
                    torch.testing.assert_close(gradient, wanted[name], rtol=bound, atol=bound)
    assert wanted["never"] is None and wanted["branch.0"] is not None
    assert all(order == results[0][1] for _, order in results), "ranks must agree on the buckets"


def test_overlap_on_and_off_are_bit_equal_on_all_ranks():
    on = run_ranks(2, three_windows, 3, 600, True)
    off = run_ranks(2, three_windows, 3, 600, False)
    reference = on[0][0][2]
    for seen, _ in (*on, *off):
        for name, gradient in seen[2].items():
            assert (gradient is None) == (reference[name] is None)
            assert gradient is None or torch.equal(gradient, reference[name]), name


def order_after_first_window(rank, world_size):
    state, reducer = make(Toy(), world_size)
    before = reducer.order
    window(state, reducer, rank, 1)
    reducer.release()
    return before, reducer.order


def test_buckets_follow_backward_after_the_first_window():
    (before, order), _ = run_ranks(2, order_after_first_window)
    assert before is None
    assert order.index("second.weight") < order.index("first.weight"), "later layers get their gradients first"
    doubles = [name for name in order if name != "narrow"]  # the one in fp32 has a bucket of its own
    assert set(doubles[-2:]) == {"branch.1", "never"}, "what backward did not touch comes last"


def resumed(rank, world_size, order):
    state, reducer = make(Toy(), world_size)
    reducer.adopt_order(order)
    return reducer.order, window(state, reducer, rank, 2)


def test_a_saved_order_is_laid_out_before_the_first_window():
    order = ["never", "first.bias", "narrow", "gone.weight"]
    (laid_out, gradients), _ = run_ranks(2, resumed, order)
    doubles = [name for name in laid_out if name != "narrow"]  # the one in fp32 has a bucket of its own
    assert doubles[:2] == ["never", "first.bias"]
    assert sorted(laid_out) == sorted(name for name, p in Toy().named_parameters() if p.requires_grad)
    torch.testing.assert_close(gradients["first.bias"], expected(2, 2)["first.bias"], rtol=1e-12, atol=1e-12)


def on_a_narrow_wire(rank, world_size):
    state, reducer = make(Toy(), world_size, dtype=torch.bfloat16)
    return window(state, reducer, rank, 1)


def test_a_narrower_reduce_dtype_rounds_and_nothing_else():
    wanted = expected(2, 1)
    for gradients in run_ranks(2, on_a_narrow_wire):
        for name, gradient in gradients.items():
            if gradient is not None:
                assert gradient.dtype == wanted[name].dtype
                torch.testing.assert_close(
                    gradient, wanted[name], rtol=2e-2, atol=2e-2 * float(wanted[name].abs().max())
                )


def gradients_are_views(rank, world_size):
    state, reducer = make(Toy(), world_size, bucket_bytes=1 << 20)
    window(state, reducer, rank, 2)
    flats = {bucket.flat.untyped_storage().data_ptr() for bucket in reducer.buckets}
    return all(p.grad.untyped_storage().data_ptr() in flats for p in state.model.parameters() if p.grad is not None)


def test_gradients_are_views_into_the_buckets():
    assert run_ranks(2, gradients_are_views) == [True, True]


def test_the_first_bucket_is_small_so_that_the_wire_starts_early(monkeypatch):
    monkeypatch.setattr("camshaft_ddp.bucket.FIRST_BYTES", 100)
    parameters = [nn.Parameter(torch.zeros(20)) for _ in range(5)]
    assert [len(bucket.parameters) for bucket in fill(parameters, 250)] == [1, 3, 1]
    assert [len(bucket.parameters) for bucket in fill(parameters, 90)] == [1] * 5


def test_buckets_hold_one_dtype_and_respect_their_size():
    parameters = [
        nn.Parameter(torch.zeros(n, dtype=d))
        for n, d in ((100, torch.float32), (3, torch.float64), (100, torch.float32))
    ]
    buckets = fill(parameters, 500)
    assert [[p.numel() for p in bucket.parameters] for bucket in buckets] == [[100], [100], [3]]
    for bucket in buckets:
        assert len({p.dtype for p in bucket.parameters}) == 1
        assert all(view.storage_offset() % ALIGNMENT == 0 for view in bucket.views)


def old_buffers_at_each_layout(rank, world_size):
    """How many flat buffers of the last layout still exist when the next one is made."""
    made, left = [], []

    def watched(parameters, bucket_bytes, stages):
        deadline = time.monotonic() + 5  # the group's thread lets go of a buffer a moment after its sum is there
        while any(buffer() is not None for buffer in made) and time.monotonic() < deadline:
            time.sleep(0.001)
        left.append(sum(buffer() is not None for buffer in made))
        buckets = fill(parameters, bucket_bytes, stages)
        made[:] = [weakref.ref(bucket.flat) for bucket in buckets]
        return buckets

    reducer_module.fill = watched
    state, reducer = make(Toy(), world_size)
    window(state, reducer, rank, 2)
    reducer.release()
    reducer.adopt_order(list(reversed(reducer.order)))
    return left


def test_a_new_layout_never_holds_two_copies_of_the_gradients():
    assert run_ranks(2, old_buffers_at_each_layout) == [[0, 0, 0]] * 2


class Shared(nn.Module):
    """One weight used by two reentrantly checkpointed parts: backward makes its gradient in two pieces."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.inner = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.outer = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x, reentrant):
        hidden = x * self.outer
        for _ in range(2):
            hidden = checkpoint(lambda h: (h * self.shared + self.inner) ** 2, hidden, use_reentrant=reentrant)
        return hidden.sum()


def shared_and_recomputed(rank, world_size, reentrant):
    state, reducer = make(Shared(), world_size)
    state.final_backward = True
    state.model(torch.full((3,), 1.0 + rank, dtype=torch.float64), reentrant).backward()
    reducer.end_backward()
    reducer.finish()
    return {name: p.grad.clone() for name, p in state.model.named_parameters()}


def test_a_gradient_that_comes_in_pieces_is_never_sent_in_part():
    model = Shared()
    for rank in range(2):
        model(torch.full((3,), 1.0 + rank, dtype=torch.float64), False).backward()
    for gradients in run_ranks(2, shared_and_recomputed, False):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-12, atol=1e-12)
    with pytest.raises(RankFailed, match=r"gradient of '(shared|inner|outer)' came after its bucket was full"):
        run_ranks(2, shared_and_recomputed, True)


def test_every_bucket_is_filled_as_far_as_its_size_allows():
    parameters = [nn.Parameter(torch.zeros(n)) for n in (5, 5, 5, 5, 40, 5, 5)]
    sizes = [[p.numel() for p in bucket.parameters] for bucket in fill(parameters, 40)]
    assert sizes == [[5, 5], [5, 5], [40], [5, 5]], "40 bytes are ten elements; a larger parameter is alone"


def started_in_backward(rank, world_size, overlap):
    """How many buckets are on their way when backward ends, in three windows of two microbatches."""
    state, reducer = make(nn.Sequential(*(nn.Linear(9, 9) for _ in range(4))), world_size, 200, overlap, torch.float32)
    started = []
    for _ in range(3):
        for microbatch in range(2):
            state.final_backward = microbatch == 1
            state.model(torch.ones(1, 9)).sum().backward()
            started.append(sum(bucket._pending is not None for bucket in reducer.buckets))
            reducer.end_backward()
        reducer.finish()
        reducer.release()
    return started, len(reducer.buckets)


def test_full_buckets_start_while_backward_runs_and_only_in_the_last_one():
    for started, buckets in run_ranks(2, started_in_backward, True):
        assert buckets == 8 and started == [0, 8, 0, 8, 0, 8]
    for started, _ in run_ranks(2, started_in_backward, False):
        assert started == [0] * 6


def order_of_the_last_backward(rank, world_size):
    state, reducer = make(Toy(), world_size)
    x = torch.ones(2, 7, dtype=torch.float64)
    for branch in (1, None):
        state.final_backward = branch is None
        state.model(x, branch).backward()
        reducer.end_backward()
    reducer.finish()
    reducer.release()
    return reducer.order


def test_the_order_is_that_of_the_backward_in_which_buckets_are_sent():
    for order in run_ranks(2, order_of_the_last_backward):
        doubles = [name for name in order if name != "narrow"]
        assert set(doubles[-3:]) == {"branch.0", "branch.1", "never"}, "untouched ones come last"
