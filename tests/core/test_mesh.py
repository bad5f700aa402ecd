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


def hybrid(world_size, **parallel):
    shape = MeshShape.of(Parallel(**parallel), world_size)
    return {axis.name: axis.degree for axis in shape.axes}


@pytest.mark.parametrize(
    ("parallel", "world_size", "replicate", "shard"),
    [
        ({"data_parallel_shard": 2}, 8, 4, 2),
        ({"data_parallel_replicate": 2}, 8, 2, 4),
        ({"data_parallel_replicate": 2, "data_parallel_shard": 4}, 8, 2, 4),
        ({"data_parallel": 8, "data_parallel_shard": 8}, 8, 1, 8),
        ({"data_parallel_shard": 1}, 3, 3, 1),
        ({"data_parallel_shard": 3, "tensor_parallel": 2, "pipeline_parallel": 2}, 24, 2, 3),
        ({"data_parallel_shard": 1}, 1, 1, 1),
    ],
)
def test_the_data_axis_is_divided_in_two(parallel, world_size, replicate, shard):
    found = hybrid(world_size, **parallel)
    assert list(found) == ["pp", "dp_replicate", "dp_shard", "cp", "tp"]
    assert (found["dp_replicate"], found["dp_shard"]) == (replicate, shard)


def test_dp_means_both_halves_and_neighbours_share_a_copy():
    shape = MeshShape.of(Parallel(data_parallel_shard=3, tensor_parallel=2), 12)
    assert shape.members("dp") == ("dp_replicate", "dp_shard") and shape.members("tp") == ("tp",)
    assert shape["dp"].degree == 6 and shape["dp"].splits_batch and shape["dp_shard"].degree == 3
    assert shape.names == ("pp", "dp_replicate", "dp_shard", "cp", "tp", "dp")
    places = [shape.coordinates(rank) for rank in range(12)]
    assert [place["dp_shard"] for place in places] == [0, 0, 1, 1, 2, 2] * 2
    assert [place["dp_replicate"] for place in places] == [0] * 6 + [1] * 6
    assert (
        [place["dp"] for place in places]
        == [shape.batch_index(rank) for rank in range(12)]
        == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    )


def test_without_hybrid_there_are_no_halves():
    shape = MeshShape.of(Parallel(), 2)
    assert shape.members("dp") == ("dp",) and shape.names == ("pp", "dp", "cp", "tp")
    with pytest.raises(KeyError, match="no axis 'dp_shard'; there are: pp, dp, cp, tp"):
        shape["dp_shard"]


@pytest.mark.parametrize(
    ("parallel", "world_size", "key", "words", "fix"),
    [
        ({"data_parallel_shard": 3}, 4, "parallel.data_parallel_shard", "4 data-parallel rank.s. cannot be", "1, 2, 4"),
        (
            {"data_parallel_replicate": 4},
            6,
            "parallel.data_parallel_replicate",
            "cannot be divided by 4",
            "a multiple of 4",
        ),
        (
            {"data_parallel": 8, "data_parallel_shard": 2, "data_parallel_replicate": 2},
            8,
            "parallel.data_parallel_shard",
            "replicate 2 x shard 2 = 4, but there are 8",
            "remove parallel.data_parallel_replicate",
        ),
        (
            {"data_parallel_shard": 2, "data_parallel_replicate": 3},
            4,
            "parallel",
            "dp 6 x .*the run has 4",
            "start 6 processes, or remove parallel.data_parallel_replicate",
        ),
        ({"data_parallel": 4, "data_parallel_shard": 2}, 2, "parallel", "dp 4 x", "set parallel.data_parallel=auto"),
    ],
)
def test_halves_that_do_not_fit_are_refused_with_key_and_fix(parallel, world_size, key, words, fix):
    with pytest.raises(RecipeError, match=words) as caught:
        MeshShape.of(Parallel(**parallel), world_size)
    (problem,) = caught.value.problems
    assert problem.key == key and fix in problem.fix


def connected_hybrid(rank, world_size):
    mesh = Mesh.connect(MeshShape.of(Parallel(data_parallel_shard=2), world_size), rank, "cpu", 17)
    ranks = {}
    for axis in ("dp_replicate", "dp_shard", "dp", "tp"):
        group = mesh.group(axis)
        assert group._get_backend(torch.device("cpu")).options._timeout.total_seconds() == 17.0
        ranks[axis] = torch.distributed.get_process_group_ranks(group)
    total = torch.tensor([2.0**rank])
    channel = mesh.channel("test", "dp")
    channel.all_reduce(total, "reduce").wait()
    assert mesh.group("dp") is mesh.group("dp") and (channel.axis, channel.size) == ("dp", world_size)
    torch.distributed.barrier()
    return ranks, dict(mesh.place), float(total), channel.rank


def test_hybrid_groups_are_the_halves_and_both_together():
    for rank, (ranks, place, total, own) in enumerate(run_ranks(4, connected_hybrid)):
        assert ranks["dp_shard"] == [rank - rank % 2, rank - rank % 2 + 1]
        assert ranks["dp_replicate"] == [rank % 2, rank % 2 + 2]
        assert ranks["dp"] == [0, 1, 2, 3] and ranks["tp"] == [rank] and total == 15.0 and own == rank
        assert (place["dp_replicate"], place["dp_shard"], place["dp"]) == (rank // 2, rank % 2, rank)


def connected_beside_tp(rank, world_size):
    mesh = Mesh.connect(MeshShape.of(Parallel(data_parallel_shard=1, tensor_parallel=2), world_size), rank, "cpu", 17)
    total = torch.tensor([2.0**rank])
    mesh.channel("test", "dp").all_reduce(total, "reduce").wait()
    torch.distributed.barrier()
    return torch.distributed.get_process_group_ranks(mesh.group("dp")), float(total)


def test_each_place_on_the_other_axes_has_a_joined_group_of_its_own():
    found = run_ranks(4, connected_beside_tp)
    assert found == [([0, 2], 5.0), ([1, 3], 10.0)] * 2


def test_a_batch_split_over_two_axes_counts_its_parts_row_by_row():
    from camshaft.mesh import Axis

    shape = MeshShape((Axis("a", "a", 2, splits_batch=True), Axis("x", "x", 2), Axis("b", "b", 3, splits_batch=True)))
    found = [shape.batch_index(rank) for rank in range(12)]
    assert found == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5] and shape.batch_degree == 6
