"""What libraries start inside, counted at torch's process groups, against bytes that are known."""

import threading

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from camshaft.comm import Call, Channel, sent
from camshaft.host import guard
from camshaft.testing.ranks import run_ranks
from camshaft_ledger.library import Tap


def heard(function, *arguments, hook=None):
    """(plugin, hook, op) to [calls, bytes that this rank sends] while ``function`` runs."""
    found = {}

    def told(call):
        count = sent(call.op, call.group.size(), call.elements) if call.away is None else call.away
        entry = found.setdefault((call.plugin, call.hook, call.op), [0, 0])
        entry[0] += 1
        entry[1] += count * call.dtype.itemsize

    tap = Tap(told)
    tap.open()
    try:
        (function if hook is None else guard("owner", hook, function))(*arguments)
    finally:
        tap.close()
    return found


def plain(rank, world_size):
    part, whole = torch.ones(6, dtype=torch.float64), torch.ones(6 * world_size, dtype=torch.float64)

    def calls():
        dist.all_reduce(part)
        dist.all_gather_into_tensor(whole, part)
        dist.reduce_scatter_tensor(part, whole)
        dist.all_gather(list(whole.split(6)), part)
        dist.broadcast(part, 1)
        dist.reduce(part, 0)
        # Rank r sends r + 1 elements to each.
        inputs, outputs = [rank + 1] * world_size, [peer + 1 for peer in range(world_size)]
        dist.all_to_all_single(torch.empty(sum(outputs)), torch.ones(sum(inputs)), outputs, inputs)
        dist.all_to_all_single(torch.empty(world_size, 3), torch.ones(world_size, 3))
        dist.barrier()
        if rank == 0:
            dist.send(part, 1)
        if rank == 1:
            dist.recv(part, 0)
        dist.gather(part, list(whole.split(6)) if rank == 0 else None, 0)
        dist.scatter(part, list(whole.split(6)) if rank == 0 else None, 0)

    return heard(calls)


@pytest.mark.parametrize("world_size", [2, 3])
def test_plain_calls(world_size):
    others = world_size - 1
    for rank, found in enumerate(run_ranks(world_size, plain)):
        whole = 48 * world_size
        expected = {
            "all_reduce": [1, 2 * 48 * others / world_size],
            "all_gather": [2, 2 * whole * others / world_size],
            "reduce_scatter": [1, whole * others / world_size],
            "broadcast": [1, 48 * others / world_size],
            "reduce": [1, 48 * others / world_size],
            "all_to_all": [2, 4 * others * (rank + 1) + 12 * others],
            "barrier": [1, 0],
            "gather": [1, 48 * others / world_size],
            "scatter": [1, 48 * others / world_size],
        }
        if rank == 0:
            expected["send"] = [1, 48]
        if rank == 1:
            expected["recv"] = [1, 0]
        assert found.keys() == {("library", "", op) for op in expected}
        for op, entry in expected.items():
            assert found["library", "", op] == pytest.approx(entry), (rank, op)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64, bias=False), nn.Linear(64, 32, bias=False))  # 4096 elements in all


def backward(module):
    module(torch.ones(2, 32)).sum().backward()


def ddp(rank, world_size):
    wrapped = DistributedDataParallel(model())
    return heard(backward, wrapped), heard(backward, wrapped, hook="forward")


def test_the_cpp_reducer_of_ddp_is_heard():
    for found, inside in run_ranks(2, ddp):
        assert found == {("library", "", "all_reduce"): [1, 4096 * 4]}
        assert inside["owner", "forward", "all_reduce"] == [1, 4096 * 4], "given to the plugin whose hook runs"
        # After its first backward DDP tells its ranks the order of its buckets.
        assert inside.keys() == {("owner", "forward", "all_reduce"), ("owner", "forward", "broadcast")}


def sharded(rank, world_size):
    mesh = init_device_mesh("cpu", (world_size,))
    wrapped = model()
    for layer in wrapped:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(wrapped, mesh=mesh)
    backward(wrapped)
    return heard(backward, wrapped)


def test_fully_shard_is_heard():
    """Two gathers of every weight (forward and backward) and one reduce-scatter: 3 (N-1)/N of all weights."""
    for found in run_ranks(2, sharded):
        assert found["library", "", "all_gather"] == [4, 2 * 4096 * 4 / 2]
        assert found["library", "", "reduce_scatter"] == [2, 4096 * 4 / 2]
        assert len(found) == 2


def redistributed(rank, world_size):
    mesh = init_device_mesh("cpu", (world_size,))
    tensor = distribute_tensor(torch.ones(8, 6), mesh, [Shard(0)])
    return heard(lambda: tensor.redistribute(mesh, [Replicate()]).to_local().sum())


def test_a_dtensor_that_is_redistributed_is_heard():
    for found in run_ranks(2, redistributed):
        assert found == {("library", "", "all_gather"): [1, 48 * 4 / 2]}


def through_channels(rank, world_size):
    line, calls = Channel(dist.group.WORLD, "zero", "dp"), []
    part, whole = torch.ones(8), torch.ones(16)
    Channel.observer = calls.append
    try:
        found = heard(
            lambda: [
                line.all_reduce(part, "reduce").wait(),
                line.reduce_scatter(part, whole, "reduce").wait(),
                line.all_gather(whole, part, "step").wait(),
                line.all_to_all([part[:4], part[4:]], [whole[:4], whole[4:8]], "reduce").wait(),
                line.broadcast(part, 0, "bind").wait(),
            ]
        )
    finally:
        Channel.observer = None
    dist.all_reduce(part)
    return found, calls


def test_what_goes_through_channels_is_not_counted_twice():
    for found, calls in run_ranks(2, through_channels):
        assert found == {}
        assert [type(call) for call in calls] == [Call] * 5
        assert [call.bytes for call in calls] == [32, 32, 32, 16, 16]


def closed(rank, world_size):
    calls = []
    for _ in range(2):
        tap = Tap(calls.append)
        tap.open()
        dist.all_reduce(torch.ones(1))
        tap.close()
    count = len(calls)
    dist.all_reduce(torch.ones(1))
    backward(DistributedDataParallel(model()))
    return count, len(calls)


def test_a_closed_tap_leaves_nothing_behind():
    assert run_ranks(2, closed) == [(2, 2)] * 2


def moving(rank, world_size):
    """gloo frees tensors with the interpreter's lock while it holds that of its queue: neither may wait for both."""
    beats, done = [], threading.Event()

    def beat():
        while not done.wait(0.001):
            beats.append(torch.ones(1))

    thread = threading.Thread(target=beat)
    thread.start()

    def calls():
        for _ in range(1500):
            works = [dist.all_reduce(torch.ones(8), async_op=True) for _ in range(4)]
            works[-1].wait()

    heard(calls)
    done.set()
    thread.join()
    return len(beats) > 10


def test_thousands_of_calls_do_not_block_one_another():
    assert run_ranks(2, moving, timeout_s=100) == [True, True]
