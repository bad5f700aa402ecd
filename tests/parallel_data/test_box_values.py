"""First values of any stretch of any box are those that one process gives the same elements."""

from itertools import pairwise

import pytest
import torch

from camshaft.models.init import BLOCK, fill, fill_stretch
from camshaft.models.roles import Initial
from camshaft.parts import Box

SHAPE, NORMAL = (37, 1500), Initial(std=0.02)  # more than three blocks, rows that no block ends at
CUTS = [0, 1, 7, 500, 501, 1500, 9001, BLOCK]


def whole():
    values = torch.empty(SHAPE, dtype=torch.float64)
    fill(values, "matrix", NORMAL, seed=3)
    return values


@pytest.mark.parametrize(
    ("shape", "offset"),
    [((37, 500), (0, 1000)), ((12, 1500), (25, 0)), ((5, 499), (30, 701)), ((37, 1500), (0, 0)), ((1, 1), (36, 1499))],
    ids=["columns", "rows", "inner", "all", "last-element"],
)
def test_stretches_of_a_box_are_stretches_of_the_whole(shape, offset):
    rows, columns = (slice(at, at + size) for at, size in zip(offset, shape, strict=True))
    wanted = whole()[rows, columns].reshape(-1)
    size = wanted.numel()
    ends = [min(end, size) for end in (*CUTS, size)]
    for start, stop in pairwise(ends):
        target = torch.full((stop - start,), float("nan"), dtype=torch.float64)
        box = Box(SHAPE, offset)
        fill_stretch(target, "matrix", NORMAL, seed=3, shape=shape, start=start, box=box)
        assert torch.equal(target, wanted[start:stop]), (start, stop)


def test_without_a_box_the_shard_is_the_whole():
    target = torch.empty(700)
    fill_stretch(target, "matrix", NORMAL, seed=3, shape=SHAPE, start=BLOCK - 300, box=None)
    assert torch.equal(target.double(), whole().view(-1)[BLOCK - 300 : BLOCK + 400])


def test_a_constant_is_a_constant_everywhere():
    target = torch.empty(5)
    fill_stretch(target, "norm", Initial(0.0, 1.0), seed=3, shape=(9,), start=2, box=Box((18,), (9,), copies=2))
    assert torch.equal(target, torch.ones(5))
