"""Random numbers follow seed, step, part of the batch, microbatch and layer, and nothing else."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from camshaft.errors import PluginError, RecipeError
from camshaft.mesh import MeshShape
from camshaft.recipe.schema import Parallel
from camshaft.seeds import Seeds


class Draws(nn.Module):
    def forward(self, times=1):
        return torch.rand(times).tolist()


class Model(nn.Module):
    pipeline = SimpleNamespace(layers="layers")

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Draws() for _ in range(3))


def stub(*, step=0, seed=5, rank=0, pieces=(), draws=True, contracts=False):
    recipe = SimpleNamespace(seed=seed, debug=SimpleNamespace(contracts=contracts))
    world = SimpleNamespace(
        recipe=recipe, draws=draws, mesh=SimpleNamespace(shape=MeshShape.of(Parallel(tensor_parallel=2), 4)),
        rank=rank, device=torch.device("cpu"), pieces=set(pieces),
    )  # fmt: skip
    return SimpleNamespace(world=world, model=Model(), step=step, microbatch=0)


def draw(order=(0, 1, 2), microbatch=0, times=1, **changes):
    """What each layer draws, in the order in which layers run."""
    state = stub(**changes)
    seeds = Seeds(state)
    state.microbatch = microbatch
    seeds.begin()
    return {number: tuple(state.model.layers[number](times)) for number in order}


def test_a_layer_draws_the_same_whoever_ran_before_it():
    whole = draw()
    assert len(set(whole.values())) == 3
    assert draw((2,)) == {2: whole[2]}
    drawn = draw((1, 2), times=7)
    assert drawn[2][0] == whole[2][0] and drawn[1][0] == whole[1][0]


def test_every_part_of_the_place_counts():
    assert draw(rank=1) == draw(), "ranks of one tensor-parallel group draw alike"
    others = [draw(step=1), draw(seed=6), draw(rank=2), draw(microbatch=1)]
    assert len({values[0] for values in (draw(), *others)}) == 5


def test_what_is_in_front_of_the_layers_follows_from_the_microbatch():
    state = stub()
    seeds, found = Seeds(state), []
    for microbatch in (0, 1, 0):
        state.microbatch = microbatch
        seeds.begin()
        found.append(float(torch.rand(())))
    assert found[0] == found[2] != found[1]


def test_a_layer_that_runs_twice_draws_other_numbers():
    state = stub()
    seeds, layers = Seeds(state), state.model.layers
    seeds.begin()
    first, between, second = layers[0](), layers[1](), layers[0]()
    assert first != second
    seeds.begin()
    assert layers[0]() == first
    seeds.begin_backward()
    assert layers[1]() == between, "run again in backward it draws what it drew"
    with pytest.raises(RecipeError, match=r"layer 0 .Draws. runs several times"):
        layers[0]()


def test_evaluation_is_left_alone():
    state = stub()
    seeds, layers = Seeds(state), state.model.layers
    seeds.begin()
    state.model.eval()
    torch.manual_seed(3)
    wanted = torch.rand(2).tolist()
    torch.manual_seed(3)
    assert [*layers[0](), *layers[1]()] == wanted


def test_layers_inside_of_a_compiled_piece_go_on_from_its_beginning():
    for piece, inside in (("layers", True), ("layers.0", False)):
        state = stub(pieces=[piece])
        seeds = Seeds(state)
        seeds.begin()
        wanted = torch.rand(1).tolist()
        seeds.begin()
        assert (state.model.layers[1]() == wanted) is inside


def test_nothing_is_seeded_where_nobody_draws():
    state = stub(draws=False)
    seeds, layers = Seeds(state), state.model.layers
    torch.manual_seed(3)
    wanted = torch.rand(2).tolist()
    torch.manual_seed(3)
    seeds.begin()
    assert [*layers[0](), *layers[1]()] == wanted
    assert not any(layer._forward_pre_hooks for layer in layers), "a module with hooks is slower to call"


@pytest.mark.parametrize("contracts", [False, True])
def test_who_draws_without_saying_so_is_told(contracts):
    """In the first window, where contracts are looked at in each."""
    state = stub(draws=False, contracts=contracts)
    seeds = Seeds(state)

    def window(times):
        seeds.start_window()
        seeds.begin()
        torch.rand(times)
        seeds.end_window()

    with pytest.raises(PluginError, match=r"were drawn during a window.*but the model and every plugin"):
        window(1)
    seeds = Seeds(state)
    window(0)
    if contracts:
        with pytest.raises(PluginError, match="draws = True"):
            window(1)
    else:
        window(1)
