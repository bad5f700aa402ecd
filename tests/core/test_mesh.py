"""Mesh arithmetic."""

import pytest
import torch

from camshaft.errors import RecipeError
from camshaft.mesh import Mesh, MeshShape
from camshaft.recipe.schema import Parallel
from camshaft.testing.ranks import run_ranks


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


def connected(rank, world_size):
    mesh = Mesh.connect(MeshShape.of(Parallel(tensor_parallel=2), world_size), rank, "cpu", 17)
    found = {}
    for axis in ("pp", "dp", "cp", "tp"):
        group = mesh.group(axis)
        seconds = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
        found[axis] = (torch.distributed.get_process_group_ranks(group), seconds)
    torch.distributed.barrier()  # a rank that leaves early breaks the connections that others are still making
    return found, dict(mesh.place), mesh.degree("tp")


def test_groups_hold_the_peers_along_their_axis_and_wait_no_longer_than_told():
    for rank, (groups, place, degree) in enumerate(run_ranks(4, connected)):
        assert groups["dp"][0] == [rank % 2, rank % 2 + 2] and groups["tp"][0] == [rank - rank % 2, rank - rank % 2 + 1]
        assert groups["pp"][0] == groups["cp"][0] == [rank]
        assert {seconds for _, seconds in groups.values()} == {17.0}
        assert place == {"pp": 0, "dp": rank // 2, "cp": 0, "tp": rank % 2} and degree == 2


def test_one_process_has_no_groups():
    assert Mesh.connect(MeshShape.of(Parallel(), 1), 0, "cpu", 17).group("dp") is None


def test_a_batch_split_over_two_axes_counts_its_parts_row_by_row():
    from camshaft.mesh import Axis

    shape = MeshShape((Axis("a", "a", 2, splits_batch=True), Axis("x", "x", 2), Axis("b", "b", 3, splits_batch=True)))
    found = [shape.batch_index(rank) for rank in range(12)]
    assert found == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5] and shape.batch_degree == 6
