"""Shards of DTensor parameters: each rank of a simulated group makes its own part, and the parts make the whole."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from model_reference import odd
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from camshaft.models.init import materialize
from camshaft.models.llama import Llama

CONFIG = odd(tie_word_embeddings=True, num_key_value_heads=2)


@pytest.fixture
def ranks():
    """Run a function once as each of six ranks, on a 2 x 3 mesh; no communication happens."""

    def run(function):
        found = []
        for rank in range(6):
            dist.init_process_group("fake", rank=rank, world_size=6, store=FakeStore())
            try:
                # torch caches layouts by mesh: with equal names the next rank would be taken for this one.
                found.append(function(init_device_mesh("cpu", (2, 3), mesh_dim_names=(f"dp{rank}", f"tp{rank}"))))
            finally:
                dist.destroy_process_group()
        return found

    return run


def meta_model():
    with torch.device("meta"):
        return Llama(CONFIG)


def lay_out(model, mesh, placements):
    done: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in done:
                laid = distribute_tensor(parameter.detach(), mesh, placements(parameter))
                done[parameter] = nn.Parameter(laid, requires_grad=parameter.ndim > 1)
            setattr(module, leaf, done[parameter])


@pytest.mark.parametrize(
    "placements",
    [
        lambda p: (Shard(0), Replicate()),
        lambda p: (Replicate(), Shard(p.ndim - 1)),
        lambda p: (Shard(0), Shard(p.ndim - 1)),
        lambda p: (Shard(0), Shard(0)),
    ],
    ids=["rows", "columns", "both", "rows twice"],
)
def test_the_shards_of_all_ranks_make_the_parameters_of_one_process(ranks, placements):
    whole = meta_model()
    materialize(whole, seed=5, device="cpu", dtype=torch.float32)
    wanted = dict(whole.named_parameters())

    def one_rank(mesh):
        model = meta_model()
        lay_out(model, mesh, placements)
        held = dict(model.named_parameters())
        materialize(model, seed=5, device="cpu", dtype=torch.float32)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        after = dict(model.named_parameters())
        for name, parameter in after.items():
            assert parameter is held[name] and isinstance(parameter, DTensor), name
            assert parameter.placements == placements(wanted[name]) and parameter.shape == wanted[name].shape
            assert parameter.requires_grad == (parameter.ndim > 1)
        return mesh.get_coordinate(), {name: parameter.to_local().detach() for name, parameter in after.items()}

    found = ranks(one_rank)
    for name, value in wanted.items():
        first, second = placements(value)
        for (row, column), local in found:
            part = value
            for place, at, degree in ((first, row, 2), (second, column, 3)):
                if isinstance(place, Shard):
                    chunks = part.chunk(degree, place.dim)
                    part = chunks[at] if at < len(chunks) else part.narrow(place.dim, 0, 0)
            assert torch.equal(local[name], part), (name, row, column)
