"""The exchange and the sums: owners, rounds, traffic, faults of storage, and parts that are split in between."""

import pytest
import torch
from torch.nn import Parameter

from camshaft.comm import Channel
from camshaft.errors import RecipeError
from camshaft.exchange import Exchange, Stretch, assign, batches, check_cover
from camshaft.parts import Box, Part, Parts, Piece
from camshaft.sums import ParameterSums
from camshaft.testing.ranks import RankFailed, run_ranks

SHAPES = {"a": (4, 3), "b": (2, 5), "c": (6,), "d": (3, 3)}
CUTS = {1: [0, 37], 2: [0, 15, 37], 3: [0, 2, 2, 37]}
"""Of all 37 elements in a row: ranks of 2 cut ``b``; of 3, rank 1 has nothing, and rank 0 a bit of ``a``."""


def whole_values():
    return {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(index))
        for index, (name, shape) in enumerate(SHAPES.items())
    }


def divided(rank, size):
    """One flat part of everything, with padding before each piece."""
    begin, end = CUTS[size][rank : rank + 2]
    pieces, values, offset = [], [], 0
    for name, whole in whole_values().items():
        start, stop = max(begin - offset, 0), min(end - offset, whole.numel())
        if start < stop:
            values += [torch.zeros(2), whole.view(-1)[start:stop]]
            pieces.append(Piece(name, SHAPES[name], start, sum(map(len, values[:-1])), stop - start))
        offset += whole.numel()
    tensor = Parameter(torch.cat(values) if values else torch.empty(0))
    channel = Channel(torch.distributed.group.WORLD, "test", "dp") if size > 1 else None
    return Parts([Part(tensor, "matrix", tuple(pieces))], channel)


def doubled(rank, size, limit, split):
    """Every owner doubles what it gets; the parts are split between two passes."""
    parts, calls = divided(rank, size), []
    Channel.observer = calls.append
    exchange = Exchange(parts, ["a", "b", "d"], torch.float32, torch.device("cpu"), limit=limit)
    seen = []
    for number in range(2):
        for current in exchange.rounds:
            held = exchange.held(current)
            whole = exchange.to_owners(current, [each.of(each.part.tensor.detach()) for each in held]).wait()
            seen += [(name, rank) for name in whole]
            for name, tensor in whole.items():
                assert torch.equal(tensor, whole_values()[name] * 2**number), name
            results = exchange.from_owners(current, {name: tensor * 2 for name, tensor in whole.items()}).wait()
            with torch.no_grad():
                for each, result in zip(exchange.held(current), results, strict=True):
                    each.of(each.part.tensor.view(-1)).copy_(result)
        if split:
            parts.isolate(["b"])
    for part in parts:
        for piece, flat in part.slices(part.tensor.detach()):
            factor = 1 if piece.name == "c" else 4
            expected = whole_values()[piece.name].view(-1)[piece.start : piece.start + piece.length] * factor
            assert torch.equal(flat, expected), piece
    return seen, exchange.owners, len(exchange.rounds), [call.op for call in calls]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(("limit", "split"), [(None, True), (9, False)])
def test_pieces_reach_their_owner_and_come_back(size, limit, split):
    ranks = run_ranks(size, doubled, limit, split)
    owners = ranks[0][1]
    assert all(each[1:] == ranks[0][1:] for each in ranks), "owners, rounds and collectives are equal on all ranks"
    assert sorted(pair for each in ranks for pair in each[0]) == sorted([*owners.items()] * 2), "each once a pass"
    assert limit is not None or ranks[0][2] == 1
    assert (ranks[0][3] == []) == (size == 1), "one process sends nothing"


def test_the_limit_bounds_what_a_rank_holds_whole():
    shapes = {f"m{index}": (10, 10) for index in range(7)} | {"large": (100, 100)}
    owners = {name: index % 2 for index, name in enumerate(shapes)}
    rounds = batches(shapes, owners, 250)
    assert sorted(name for names in rounds for name in names) == sorted(shapes)
    for names in rounds:
        for rank in (0, 1):
            mine = [name for name in names if owners[name] == rank]
            assert len(mine) <= 2 and ("large" not in mine or mine == ["large"])
    assert len(batches(shapes, owners, None)) == 1


def test_work_is_even_and_what_can_stay_stays():
    shapes = {f"m{index}": (8, 8) for index in range(16)}
    order = list(shapes)
    tables = [[Stretch(name, 0, 64) for name in order[rank * 4 : rank * 4 + 4]] for rank in range(4)]
    owners = assign(shapes, tables, lambda shape: shape[0])
    assert all(owners[stretch.name] == rank for rank, table in enumerate(tables) for stretch in table)
    everything_on_one = [[Stretch(name, 0, 64) for name in order], [], [], []]
    owners = assign(shapes, everything_on_one, lambda shape: shape[0])
    assert sorted(owners.values()) == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4


def test_a_costly_matrix_gets_a_rank_of_its_own():
    shapes = {"large": (100, 100)} | {f"m{index}": (10, 10) for index in range(6)}
    tables = [[Stretch(name, 0, shape[0] * shape[1]) for name, shape in shapes.items()], []]
    owners = assign(shapes, tables, lambda shape: float(shape[0] ** 3))
    assert owners["large"] == 0 and all(owners[f"m{index}"] == 1 for index in range(6))


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ([[Stretch("a", 0, 4)], [Stretch("a", 3, 3)]], "elements 3 to 4 lie on 2 ranks, and should lie once"),
        ([[Stretch("a", 0, 2)], [Stretch("a", 4, 2)]], "elements 2 to 4 lie on 0 ranks"),
        ([[Stretch("a", 0, 2)], []], "elements from 2 of 6 lie nowhere"),
        ([[Stretch("a", 0, 6)], [Stretch("a", 0, 6)]], "'a' is not divided into disjoint pieces"),
    ],
)
def test_pieces_must_cover_each_parameter_once(tables, words):
    with pytest.raises(RecipeError, match=words):
        check_cover({"a": (2, 3)}, tables)
    check_cover({"a": (2, 3)}, [[Stretch("a", 4, 2)], [Stretch("a", 0, 4)]])


def summed(rank, size):
    parts = divided(rank, size)
    sums = ParameterSums(parts, SHAPES, torch.device("cpu"))
    before = sums({part: part.tensor for part in parts}, {}, {part: 3 * part.tensor for part in parts})
    parts.isolate(["c"])
    kept = [part for part in parts if all(piece.name != "c" for piece in part.pieces)]
    return before, sums({part: part.tensor for part in kept})


@pytest.mark.parametrize("size", [1, 2, 3])
def test_sums_are_those_of_whole_parameters(size):
    ranks = run_ranks(size, summed)
    expected = torch.stack([whole.double().square().sum() for whole in whole_values().values()])
    for before, after in ranks:
        assert before.dtype == torch.float64 and before.shape == (3, 4)
        assert torch.allclose(before[0], expected, rtol=1e-6) and not before[1].any()
        assert torch.allclose(before[2], 9 * expected, rtol=1e-6)
        assert torch.allclose(after[0], expected * torch.tensor([1, 1, 0, 1]), rtol=1e-6)
        assert torch.equal(before, ranks[0][0]) and torch.equal(after, ranks[0][1]), "in every bit"


WHOLE = torch.arange(42, dtype=torch.float64).view(6, 7)


def boxed(rank, size):
    """Columns of one matrix on ranks 0 and 1, and the last ones on rank 2 again; copies of another on all."""
    first, last = (0, 4) if rank == 0 else (4, 7)
    columns = Piece("m", (6, last - first), 0, 0, 6 * (last - first), Box((6, 7), (0, first)))
    same = Piece("n", (2, 2), 0, 48, 4, Box((2, 2), (0, 0), copies=size))
    tensor = torch.zeros(52, dtype=torch.float64)
    tensor[: columns.length] = WHOLE[:, first:last].reshape(-1)
    tensor[48:] = torch.arange(4.0)
    part = Part(Parameter(tensor), "matrix", (columns, same))
    parts = Parts([part])
    parts.holders = Channel(torch.distributed.group.WORLD, "test", "tp")
    exchange = Exchange(parts, ["m", "n"], torch.float64, torch.device("cpu"))
    sums = ParameterSums(parts, ["m", "n"], torch.device("cpu"))({part: tensor})
    (current,) = exchange.rounds
    whole = exchange.to_owners(current, [each.of(tensor) for each in exchange.held(current)]).wait()
    back = exchange.from_owners(current, {name: matrix * 2 for name, matrix in whole.items()}).wait()
    wanted = [WHOLE[:, first:last].reshape(-1) * 2, torch.arange(4.0, dtype=torch.float64) * 2]
    assert all(torch.equal(one, other) for one, other in zip(back, wanted, strict=True))
    return whole, sums


def test_an_element_that_ranks_hold_unequally_often_is_refused():
    with pytest.raises(RankFailed, match="RecipeError: parameter 'm' is not divided into disjoint pieces: elements"):
        run_ranks(3, boxed)


def test_columns_are_put_together_and_every_copy_gets_the_result():
    found, sums = zip(*run_ranks(2, boxed), strict=True)
    whole = {name: matrix for of_rank in found for name, matrix in of_rank.items()}
    assert torch.equal(whole["m"], WHOLE) and torch.equal(whole["n"], torch.arange(4.0).double().view(2, 2))
    for each in sums:
        assert torch.allclose(each[0], torch.tensor([float(WHOLE.square().sum()), 14.0], dtype=torch.float64))
        assert torch.equal(each, sums[0])


def replicated(rank, size, kind):
    parts = divided(0, 1)
    parts.channel = parts.holders = Channel(torch.distributed.group.WORLD, "test", "dp")
    if kind == "sums":
        ParameterSums(parts, SHAPES, torch.device("cpu"))
    else:
        Exchange(parts, SHAPES, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("kind", ["sums", "exchange"])
def test_storage_that_gives_two_ranks_the_same_piece_is_named(kind):
    with pytest.raises(RankFailed, match="RecipeError: parameter 'a' is not divided into disjoint pieces"):
        run_ranks(2, replicated, kind)


def sharded_dtensor(rank, size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    tensor = Parameter(distribute_tensor(torch.ones(4, 3), init_device_mesh("cpu", (size,)), [Shard(0)]))
    parts = Parts([Part(tensor, "matrix", (Piece("a", (4, 3), 0, 0, 12),))])
    for kind in (
        lambda: ParameterSums(parts, ["a"], torch.device("cpu")),
        lambda: Exchange(parts, ["a"], torch.float32, torch.device("cpu")),
    ):
        with pytest.raises(RecipeError, match="'a' is a DTensor"):
            kind()


def test_dtensors_are_refused_and_not_computed_wrongly():
    run_ranks(2, sharded_dtensor)
