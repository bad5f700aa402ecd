"""The plugin around the reducer: options and policy reach it, its state survives other numbers of ranks, it ends."""

from types import SimpleNamespace

import torch
from torch import nn

from camshaft.mesh import Mesh, MeshShape
from camshaft.recipe.schema import Parallel
from camshaft.state import Policy
from camshaft.testing.ranks import run_ranks
from camshaft_ddp import Options, Plugin


def bound(rank, world_size, order=None, compute=torch.float32, **options):
    """A plugin bound to a model of eight parameters, 360 or 36 bytes each."""
    model = nn.Sequential(*(nn.Linear(10, 9) if index % 2 == 0 else nn.Linear(9, 10) for index in range(4)))
    mesh = Mesh.connect(MeshShape.of(Parallel(), world_size), rank, "cpu", 30)
    policy = Policy(torch.float32, compute, torch.float32, torch.float32)
    world = SimpleNamespace(mesh=mesh, policy=policy, stages={})
    state = SimpleNamespace(world=world, model=model, stage=0, final_backward=True)
    plugin = Plugin(Options(**options))
    plugin.bind(state)
    if order is not None:
        plugin.load_state_dict({"order": order})
    return state, plugin


def window(state, plugin):
    state.model(torch.ones(2, 10)).sum().backward()
    plugin.post_backward()
    plugin.reduce()
    found = [parameter.grad.clone() for parameter in state.model.parameters()]
    plugin.release()
    assert all(parameter.grad is None for parameter in state.model.parameters())
    return found


def reached(rank, world_size):
    _, small = bound(rank, world_size, compute=torch.bfloat16, bucket_size_mb=400 / 2**20, overlap=False)
    _, large = bound(rank, world_size)
    found = small._reducer, large._reducer
    return [(len(reducer.buckets), reducer._dtype, reducer._overlap) for reducer in found]


def test_options_and_policy_reach_the_reducer():
    for found in run_ranks(2, reached):
        # 36 and 360 bytes share a bucket of 400; gradients travel in the policy's dtype of reduction, not of products.
        assert found == [(4, torch.float32, False), (1, torch.float32, True)]


def saved_order(rank, world_size, order=None):
    state, plugin = bound(rank, world_size, order)
    first = plugin.state_dict()["order"]
    window(state, plugin)
    window(state, plugin)
    return first, plugin.state_dict()["order"]


def test_the_order_is_saved_taken_back_and_carried_through_one_rank():
    (first, order), (_, other) = run_ranks(2, saved_order)
    assert first is None and order == other and order[0].startswith("3."), "the last layer's gradients come first"
    turned = list(reversed(order))
    for before, after in run_ranks(2, saved_order, turned):
        assert before == after == turned, "a saved order is kept, not measured again"
    assert run_ranks(1, saved_order, turned) == [(turned, turned)]


def alone(rank, world_size):
    state, plugin = bound(rank, world_size)
    gradients = window(state, plugin)
    plugin.close()
    return plugin._reducer is None and all(float(gradient.abs().sum()) > 0 for gradient in gradients)


def test_one_rank_keeps_its_gradients_as_they_are():
    assert run_ranks(1, alone) == [True]


def closed(rank, world_size):
    state, plugin = bound(rank, world_size)
    summed = window(state, plugin)
    plugin.close()
    plugin.close()
    assert not any(parameter._post_accumulate_grad_hooks for parameter in state.model.parameters())
    state.model(torch.ones(2, 10)).sum().backward()
    # Without hooks nothing is sent: the gradient is this rank's own, half the sum of two equal ranks.
    return [torch.allclose(2 * p.grad, total) for p, total in zip(state.model.parameters(), summed, strict=True)]


def test_a_closed_plugin_leaves_nothing_on_the_parameters():
    torch.manual_seed(0)  # forked ranks go on from here alike
    assert run_ranks(2, closed) == [[True] * 8] * 2
