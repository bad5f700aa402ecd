"""What really goes over the wire, by the counters of the loopback interface, against theory."""

import pytest
import torch
import torch.distributed as dist
from private_loopback import alone, sent_bytes

from camshaft.comm import Channel, sent
from camshaft.testing.ranks import run_ranks

PER_RANK = 1 << 20
CONSTANT = 8192
"""Bytes: barriers around the call, and the packets that announce and acknowledge its messages."""


def calls(line, rank, size):
    """(name, elements of the whole, call) of each collective."""
    whole, part = torch.ones(size * PER_RANK), torch.ones(PER_RANK)
    # Rank r sends 2 ** 17 * (r + 1) elements to each other rank.
    lengths = [(1 << 17) * (source + 1) for source in range(size)]
    sources = [torch.ones(lengths[rank]) for _ in range(size)]
    outputs = [torch.empty(lengths[source]) for source in range(size)]
    return {
        "all_reduce": (whole.numel(), lambda: line.all_reduce(whole, "reduce")),
        "reduce_scatter": (whole.numel(), lambda: line.reduce_scatter(part, whole, "reduce")),
        "all_gather": (whole.numel(), lambda: line.all_gather(whole, part, "step")),
        "broadcast": (whole.numel(), lambda: line.broadcast(whole, 0, "bind")),
        "all_to_all": (sum(lengths) * size, lambda: line.all_to_all(outputs, sources, "reduce")),
    }


def measure(rank, world_size):
    line, found = Channel(dist.group.WORLD, "tester", "dp"), {}
    for name, (elements, call) in calls(line, rank, world_size).items():
        call().wait()
        dist.barrier()
        before = sent_bytes()
        dist.barrier()
        call().wait()
        dist.barrier()
        found[name] = (sent_bytes() - before, world_size * 4 * sent(name, world_size, elements))
        dist.barrier()
    return found


def most(theory):
    """Bytes that may be on the wire for ``theory`` of them: headers are under 1 %."""
    return theory * 1.01 + CONSTANT


def least(world_size):
    """Of up to five turns, of each collective the least: nobody can send less than what it takes.

    A busy machine sends some packets twice, because their acknowledgement came late; others may use the interface too.
    """
    found = run_ranks(world_size, measure)[0]
    for _ in range(4):
        if all(measured <= most(theory) for measured, theory in found.values()):
            break
        again = run_ranks(world_size, measure)[0]
        found = {name: (min(measured, again[name][0]), theory) for name, (measured, theory) in found.items()}
    return found


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_bytes_on_the_wire_are_what_theory_says(world_size):
    found, _ = alone(least, world_size)
    for name, (measured, theory) in found.items():
        assert theory * 0.999 <= measured <= most(theory), (name, measured / theory)
