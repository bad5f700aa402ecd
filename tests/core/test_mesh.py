"""Mesh arithmetic."""

import pytest

from camshaft.errors import RecipeError
from camshaft.mesh import MeshShape
from camshaft.recipe.schema import Parallel


def test_auto_takes_what_the_other_degrees_leave():
    shape = MeshShape.of(Parallel(tensor_parallel=2, pipeline_parallel=2), 16)
    assert {axis.name: axis.degree for axis in shape.axes} == {"pp": 2, "dp": 4, "cp": 1, "tp": 2}
    assert shape.world_size == 16 and shape.batch_degree == 4


@pytest.mark.parametrize("world_size", [1, 2, 6, 24])
def test_coordinates_are_a_bijection_and_tp_is_the_fastest_digit(world_size):
    shape = MeshShape.of(Parallel(tensor_parallel=2 if world_size % 2 == 0 else 1), world_size)
    places = [tuple(shape.coordinates(rank).items()) for rank in range(world_size)]
    assert len(set(places)) == world_size
    if world_size > 1:
        assert shape.coordinates(1)["tp"] == 1 and shape.coordinates(1)["dp"] == 0


def test_ranks_that_differ_only_in_tp_read_the_same_samples():
    shape = MeshShape.of(Parallel(tensor_parallel=2), 4)
    assert [shape.batch_index(rank) for rank in range(4)] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("parallel", "world_size", "words"),
    [
        (Parallel(tensor_parallel=4), 6, "cannot be divided"),
        (Parallel(data_parallel=4), 2, "start 4 processes"),
    ],
)
def test_degrees_must_multiply_to_the_processes(parallel, world_size, words):
    with pytest.raises(RecipeError, match=words):
        MeshShape.of(parallel, world_size)
