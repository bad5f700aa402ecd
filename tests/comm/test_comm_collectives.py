"""Collectives of a channel against what they are defined as, on 1 to 4 ranks, in every dtype, in place and pending."""

import time
import warnings

import pytest
import torch
import torch.distributed as dist

from camshaft import comm
from camshaft.comm import FEW, Channel
from camshaft.comm_exchange import CHUNK, Scratch, add_in_order, exchange
from camshaft.mesh import Mesh, MeshShape
from camshaft.recipe.schema import Parallel
from camshaft.testing.ranks import RankFailed, run_ranks

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64)
SIZES = (0, 1, 3, 127, 4099, CHUNK + 5)


def value(rank, count, dtype, salt=0):
    """What ``rank`` contributes: the same on whoever asks."""
    generator = torch.Generator().manual_seed(1000 * salt + 10 * rank + count % 7)
    if dtype == torch.int64:
        return torch.randint(-(2**40), 2**40, (count,), generator=generator)
    return torch.randn(count, generator=generator, dtype=torch.float64).to(dtype)


def summed(values):
    """In ascending order; narrow dtypes in fp32, rounded once."""
    dtype = values[0].dtype
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    total = values[0].to(wide)
    for one in values[1:]:
        total = total + one.to(wide)
    return total.to(dtype)


def channel(rank, world_size):
    """Over all ranks; with one, over a group of itself, which torch makes for us to leave alone."""
    if world_size == 1:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return Channel(dist.group.WORLD, "tester", "dp")


def reduce_scatter(rank, world_size):
    line, kept = channel(rank, world_size), []
    for dtype in DTYPES:
        for count in SIZES:
            whole = [value(r, count * world_size, dtype) for r in range(world_size)]
            expected = summed([one[rank * count : (rank + 1) * count] for one in whole])
            output, source = torch.empty(count, dtype=dtype), whole[rank].clone()
            line.reduce_scatter(output, source, "reduce").wait()
            assert torch.equal(output, expected), (dtype, count)
            assert torch.equal(source, whole[rank]), "the source was changed although the output is elsewhere"
            kept.append((line._scratch.free_bytes, dtype.itemsize * count))
            line.trim()
            own = source[rank * count : (rank + 1) * count]
            line.reduce_scatter(own, source, "reduce").wait()
            assert torch.equal(own, expected), (dtype, count, "in place")
            kept.append((line._scratch.free_bytes, dtype.itemsize * count))
            line.trim()
    return kept


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_reduce_scatter_adds_in_ascending_order(world_size):
    for kept in run_ranks(world_size, reduce_scatter):
        for found, elsewhere in ((kept[::2], True), (kept[1::2], False)):
            assert len(found) == len(DTYPES) * len(SIZES)
            others = max(world_size - 1 - elsewhere, 0)  # the output itself takes what comes from one of them
            assert all(size == others * stretch for size, stretch in found), elsewhere


def all_gather(rank, world_size):
    line = channel(rank, world_size)
    for dtype in DTYPES:
        for count in SIZES:
            expected = torch.cat([value(r, count, dtype) for r in range(world_size)])
            output, source = torch.zeros(count * world_size, dtype=dtype), value(rank, count, dtype)
            line.all_gather(output, source, "step").wait()
            assert torch.equal(output, expected), (dtype, count)
            output = torch.zeros(count * world_size, dtype=dtype)
            own = output[rank * count : (rank + 1) * count].copy_(source)
            line.all_gather(output, own, "step").wait()
            assert torch.equal(output, expected), (dtype, count, "in place")


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_all_gather_in_rank_order(world_size):
    run_ranks(world_size, all_gather)


def all_to_all(rank, world_size):
    line = channel(rank, world_size)

    def length(source, target, turn):
        """Different for each pair; some are nothing, and in turn 2 rank 0 has nothing at all, in either direction."""
        if turn == 2 and 0 in (source, target):
            return 0
        return (0, 1, 5, 1001, 70003)[(2 * source + 3 * target + turn) % 5]

    ranks = range(world_size)
    for dtype in DTYPES:
        for turn in range(4):
            sources = [value(rank, length(rank, target, turn), dtype, salt=target) for target in ranks]
            expected = [value(source, length(source, rank, turn), dtype, salt=rank) for source in ranks]
            outputs = [torch.zeros_like(one) for one in expected]
            if turn == 2 and rank == 0:
                outputs, sources, expected = [], [], []
            line.all_to_all(outputs, sources, "reduce").wait()
            assert all(torch.equal(one, other) for one, other in zip(outputs, expected, strict=True)), (dtype, turn)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_all_to_all_of_uneven_and_empty_lengths(world_size):
    run_ranks(world_size, all_to_all)


def one_sided(rank, world_size):
    line = channel(rank, world_size)
    received = torch.zeros(5, dtype=torch.int64)
    if rank == 0:
        line.all_to_all([], [received[:0], value(0, 5, torch.int64)], "reduce").wait()
    else:
        line.all_to_all([received, received[:0]], [], "reduce").wait()
        assert torch.equal(received, value(0, 5, torch.int64))


def test_an_empty_list_stands_for_empty_tensors():
    run_ranks(2, one_sided)


def all_reduce_and_broadcast(rank, world_size):
    line = channel(rank, world_size)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int64):
        values = [value(r, 5003, dtype) for r in range(world_size)]
        total, largest, sent = (values[rank].clone() for _ in range(3))
        works = [line.all_reduce(total, "reduce"), line.all_reduce(largest, "clip", "max")]
        works.append(line.broadcast(sent, world_size - 1, "bind"))
        for work in works:
            work.wait()
            work.wait()
        exact = torch.stack([one.double() for one in values]).sum(0)
        if dtype == torch.int64:
            assert torch.equal(total, torch.stack(values).sum(0))
        else:
            assert float((total.double() - exact).abs().max()) <= 16 * torch.finfo(dtype).eps
        assert torch.equal(largest, torch.stack(values).amax(0))
        assert torch.equal(sent, values[-1])


def swapped(rank, world_size):
    """What two ranks swap has the bits of gloo's own, at every length around the longest, and several at once."""
    line, pending = channel(rank, world_size), []
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64):
        for length in (1, 2, 5, FEW - 1, FEW, FEW + 1):
            for op in ("sum", "max"):
                ours = value(rank, length, dtype)
                theirs = ours.clone()
                dist.all_reduce(theirs, dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX)
                pending.append((line.all_reduce(ours, "reduce", op), ours, theirs))
    for work, ours, theirs in reversed(pending):
        work.wait()
        assert torch.equal(ours, theirs)
    empty, alone = torch.empty(0), torch.tensor(float("nan") if rank else 1.0)
    line.all_reduce(empty, "reduce").wait()
    line.all_reduce(alone, "clip", "max").wait()
    assert bool(alone.isnan()), "whoever has the NaN"


def test_two_ranks_swap_few_numbers():
    run_ranks(2, swapped)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_all_reduce_and_broadcast(world_size):
    run_ranks(world_size, all_reduce_and_broadcast)


def many_pending(rank, world_size):
    """Calls of the same and of different sizes under way at once; each rank waits in another order."""
    line, other = channel(rank, world_size), Channel(dist.group.WORLD, "neighbour", "dp")
    ranks, started = range(world_size), []
    for turn in range(12):
        count = (17, 17, 30011, 70001)[turn % 4]
        whole = [value(r, count * world_size, torch.float32, salt=turn) for r in ranks]
        own = slice(rank * count, (rank + 1) * count)
        user = (line, other)[turn % 2]
        output = torch.empty(count)
        expected = summed([one[own] for one in whole])
        started.append((user.reduce_scatter(output, whole[rank], "reduce"), output, expected))
        output = torch.empty(count * world_size)
        expected = torch.cat([one[:count] for one in whole])
        started.append((user.all_gather(output, whole[rank][:count], "step"), output, expected))
        outputs = [torch.empty(count) for _ in ranks]
        expected = torch.cat([one[own] for one in whole])
        started.append((user.all_to_all(outputs, whole[rank].split(count), "reduce"), outputs, expected))
    order = torch.randperm(len(started), generator=torch.Generator().manual_seed(rank)).tolist()
    for index in order:
        work, output, expected = started[index]
        work.wait()
        assert torch.equal(torch.cat(output) if isinstance(output, list) else output, expected), index
    return len(line._scratch._free)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_pending_calls_do_not_cross_whatever_the_order_of_waiting(world_size):
    assert all(kept <= 6 for kept in run_ranks(world_size, many_pending))


def progress(rank, world_size):
    """What is received is there although nobody has waited: gloo's own thread moves the messages."""
    line, count = channel(rank, world_size), 1 << 20
    source, output, whole = torch.ones(world_size * count), torch.empty(count), torch.empty(world_size * count)
    mine = slice(rank * count, (rank + 1) * count)
    for start, received in (
        (lambda: line.reduce_scatter(output, source, "reduce"), lambda: output.view(torch.uint8)),
        (lambda: line.all_gather(whole, source[mine], "step"), lambda: whole.view(torch.uint8)),
        (
            lambda: line.all_to_all(whole.split(count), source.split(count), "reduce"),
            lambda: whole.view(torch.uint8),
        ),
    ):
        whole.zero_()
        start().wait()
        dist.barrier()
        whole.zero_()
        output.zero_()
        work = start()
        deadline = time.monotonic() + 20
        while not bool((received().view(torch.float32) == 1).all()) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert bool((received().view(torch.float32) == 1).all()), "nothing moves unless somebody waits"
        work.wait()
        dist.barrier()


def test_messages_travel_while_nobody_waits():
    run_ranks(2, progress)


def parameters(rank, world_size):
    line = channel(rank, world_size)
    weight, whole = torch.nn.Parameter(torch.full((6,), 1.0 + rank)), torch.zeros(6 * world_size, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        line.all_gather(whole, weight, "pre_forward").wait()
    assert whole.is_leaf and whole.tolist() == [1.0] * 6 + [2.0] * 6


def test_tensors_that_require_gradients_are_gathered_without_a_graph():
    run_ranks(2, parameters)


def flat_collectives(rank, world_size):
    """What tensors on a GPU take, whatever this torch calls it; gloo has them too."""
    part, whole = torch.empty(3), torch.empty(3 * world_size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        comm._scatter(part, torch.arange(6.0), group=dist.group.WORLD, async_op=True).wait()
        comm._gather(whole, part, group=dist.group.WORLD, async_op=True).wait()
    return whole.tolist()


def test_the_flat_collectives_of_this_torch_are_called_by_names_that_it_does_not_warn_of():
    assert run_ranks(2, flat_collectives) == [[0.0, 2.0, 4.0, 6.0, 8.0, 10.0]] * 2


def mismatched(rank, world_size):
    line = Mesh.connect(MeshShape.of(Parallel(), world_size), rank, "cpu", 2).channel("tester", "dp")
    count = 8 + rank
    line.all_gather(torch.empty(2 * count), torch.ones(count), "step").wait()


def test_lengths_that_differ_time_out_and_do_not_end_the_process():
    with pytest.raises(RankFailed, match=r"Timed out waiting 2000ms") as caught:
        run_ranks(2, mismatched)
    assert "died without a report" not in str(caught.value)


def test_a_sum_may_be_made_into_any_of_its_parts():
    for place in range(4):
        parts = [value(r, CHUNK + 3, torch.float32) for r in range(4)]
        expected = summed(parts)
        add_in_order(parts[place], parts)
        assert torch.equal(parts[place], expected)


def test_narrow_sums_are_rounded_once():
    parts = [torch.tensor([256.0], dtype=torch.bfloat16), *(torch.ones(1, dtype=torch.bfloat16) for _ in range(2))]
    total = torch.empty(1, dtype=torch.bfloat16)
    add_in_order(total, parts)
    assert float(total) == 258.0, "rounded after each addition, 256 + 1 stays 256"


def test_scratch_keeps_as_many_buffers_as_were_lent_at_once():
    scratch = Scratch()
    for sizes in ((10, 20), (1000, 30), (5, 500)):
        for buffer in [scratch.take(size) for size in sizes]:
            assert buffer.nbytes in sizes
            scratch.give(buffer)
    assert scratch.free_bytes == 1000 + 30


def in_two_directions(rank, world_size, collective):
    """``collective`` with connections of their own for what goes to lower ranks."""
    build = Channel.__init__

    def build_and_split(line, *arguments):
        build(line, *arguments)
        line.split_directions()
        assert (line._back is line.group) == (world_size == 1)

    Channel.__init__ = build_and_split
    return collective(rank, world_size)


@pytest.mark.parametrize("collective", [reduce_scatter, all_gather, all_to_all], ids=lambda each: each.__name__)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_directions_may_be_split(world_size, collective):
    assert len(run_ranks(world_size, in_two_directions, collective)) == world_size


class Connections:
    """Of a group: notes who is sent to and received from."""

    def __init__(self):
        self.sent, self.received = [], []

    def send(self, tensors, peer, tag):
        self.sent.append(peer)

    def recv(self, tensors, peer, tag):
        self.received.append(peer)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_what_goes_to_lower_ranks_has_its_own_connections(rank):
    up, down, tensors = Connections(), Connections(), [torch.ones(2) for _ in range(3)]
    assert len(exchange(up, down, rank, tensors, tensors)) == 4
    lower, higher = list(range(rank)), list(range(rank + 1, 3))
    assert (sorted(up.sent), sorted(up.received)) == (higher, lower)
    assert (sorted(down.sent), sorted(down.received)) == (lower, higher)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_messages_to_lower_ranks_have_them_too(rank):
    line = object.__new__(Channel)  # without a group
    line.rank, line.group, line._back, line._timeout = rank, Connections(), Connections(), None
    for peer in {0, 1, 2} - {rank}:
        line.send(torch.ones(2), peer, "handlers")
        line.recv(torch.ones(2), peer, "handlers")
    lower, higher = list(range(rank)), list(range(rank + 1, 3))
    assert (line.group.sent, line.group.received) == (higher, lower)
    assert (line._back.sent, line._back.received) == (lower, higher)


@pytest.mark.parametrize(
    ("backend", "kind"), [("gloo", "cpu"), ("nccl", "cuda"), ("cpu:gloo,cuda:nccl", "cuda"), ("cpu:gloo", "cpu")]
)
def test_a_rank_with_nothing_to_send_takes_part_where_the_others_do(monkeypatch, backend, kind):
    """Else it would wait for messages of gloo's, and the others for its part of a collective of nccl's."""
    monkeypatch.setattr(dist, "get_backend", lambda group: dist.Backend(backend))
    assert comm._device(None).type == kind
