"""Whether what was chosen is called: seen in eager and in compiled models, at no cost to the latter."""

from types import SimpleNamespace

import pytest
import torch

from camshaft.ops import Ops
from camshaft_kernels.choice import Choice
from camshaft_kernels.usage import Usage


class Model(torch.nn.Module):
    """Somebody else's: it looks into the table when it runs."""

    def __init__(self, ops):
        super().__init__()
        self.table = ops

    def forward(self, gate, up):
        return self.table.swiglu(gate, up)


def state_of(model, world):
    return SimpleNamespace(model=model, world=world)


@pytest.fixture
def world():
    return SimpleNamespace(ops=Ops(), makes_loss=True)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_call_is_seen(world, compiled):
    usage, choice = Usage(world, foreign=True), Choice("swiglu", "mine", "mine", "")
    world.ops.replace(usage.watch("swiglu", {"swiglu": lambda gate, up: gate * up}))
    model = Model(world.ops)
    assert usage.idle([choice], state_of(model, world)) == ["swiglu"]
    assert usage.idle([Choice("swiglu", "auto", "mine", "")], state_of(model, world)) == []
    compiles = 0

    def backend(graph, inputs):
        nonlocal compiles
        compiles += 1
        return graph.forward

    call = torch.compile(model, backend=backend, fullgraph=True) if compiled else model
    values = torch.rand(3, 4), torch.rand(3, 4)
    for _ in range(3):
        torch.testing.assert_close(call(*values), values[0] * values[1])
    assert usage.idle([choice], state_of(model, world)) == []
    assert compiles == int(compiled), "seeing it breaks no graph and compiles nothing anew"


def test_losses_of_ranks_that_make_none_are_no_fault(world):
    usage, choice = Usage(world, foreign=True), Choice("linear_cross_entropy", "torch", "torch", "")
    model = Model(world.ops)
    assert usage.idle([choice], state_of(model, world)) == ["linear_cross_entropy"]
    world.makes_loss = False
    assert usage.idle([choice], state_of(model, world)) == []


@pytest.mark.parametrize("look", [lambda updates: updates.get("adamw"), lambda updates: updates["adamw"]])
def test_optimizers_are_seen_to_look_their_update_up(world, look):
    usage, choice = Usage(world, foreign=False), Choice("adamw", "triton", "triton", "")
    world.ops.replace(usage.watch("adamw", {"updates.adamw": print}))
    assert usage.idle([choice], state_of(Model(world.ops), world)) == ["adamw"]
    assert look(world.ops.updates) is print
    assert usage.idle([choice], state_of(Model(world.ops), world)) == []


def test_a_norm_is_seen_when_it_is_taken(world):
    usage, choice = Usage(world, foreign=False), Choice("grad_norm", "apex", "apex", "")
    world.ops.replace(usage.watch("grad_norm", {"grad_norm": lambda tensors: len(tensors)}))
    assert usage.idle([choice], state_of(Model(world.ops), world)) == ["grad_norm"]
    assert world.ops.grad_norm([1, 2]) == 2
    assert usage.idle([choice], state_of(Model(world.ops), world)) == []
