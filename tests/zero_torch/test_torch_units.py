"""What ``provider: torch`` makes a unit, and what it refuses."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from camshaft.errors import PluginError
from camshaft_zero.fully_shard import TorchStorage, units


class Tree(nn.Module):
    def __init__(self, blocks=3):
        super().__init__()
        self.table = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(blocks))


def test_members_of_the_outermost_lists_are_units():
    model = Tree()
    model.blocks[1].experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    model.deep = nn.Sequential(nn.ModuleList([nn.Linear(4, 4), nn.ReLU()]))
    assert units(model) == [*model.blocks, model.deep[0][0]]


def test_members_that_share_a_parameter_stay_with_the_root():
    model = Tree()
    model.blocks[2][1].weight = model.table.weight
    assert units(model) == list(model.blocks[:2])
    model = Tree()
    model.blocks[0][0].weight = model.blocks[1][0].weight
    assert units(model) == [model.blocks[2]]
    model = Tree()
    model.blocks[1][0].weight = model.blocks[1][1].weight
    assert units(model) == list(model.blocks), "a tie inside of a unit is its own matter"


def test_a_module_that_is_used_twice_stays_with_the_root():
    model = Tree()
    model.blocks.append(model.blocks[0])
    assert units(model) == list(model.blocks[1:3])


def world(ranks, device_mesh):
    mesh = SimpleNamespace(
        device_mesh=device_mesh, degree=lambda axis: ranks, shape=SimpleNamespace(members=lambda name: (name,))
    )
    policy = SimpleNamespace(param=torch.float32, master=torch.float32, reduce=torch.float32)
    return SimpleNamespace(mesh=mesh, policy=policy)


@pytest.mark.parametrize("device_mesh", [None, {("dp",): object()}], ids=["one process", "one data rank"])
def test_one_data_rank_is_refused(device_mesh):
    with pytest.raises(PluginError, match=r"this run has one; start more processes, or set plugins\.zero\.prov"):
        TorchStorage(world(1, device_mesh), Tree(), reshard_after_forward=True, reduce="each")


def test_a_scalar_parameter_is_refused_by_name():
    model = Tree()
    model.blocks[0].scale = nn.Parameter(torch.empty((), device="meta"))
    with pytest.raises(PluginError, match=r"cannot divide parameter 'blocks.0.scale': it is a scalar; give it the sh"):
        TorchStorage(world(2, {("dp",): object()}), model, reshard_after_forward=True, reduce="each")
