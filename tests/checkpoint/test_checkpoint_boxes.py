"""A stretch of a flattening as boxes: each element once, in order, and few boxes."""

from __future__ import annotations

from math import prod

import pytest
import torch

from camshaft_checkpoint.boxes import boxes
from camshaft_checkpoint.held import Divided

SHAPES = [(), (1,), (5,), (4, 3), (1, 6), (6, 1), (3, 1, 5), (2, 3, 4), (2, 2, 3, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_boxes_of_every_stretch_hold_its_elements_in_order(shape: tuple[int, ...]) -> None:
    size = prod(shape)
    whole = torch.arange(size).reshape(shape)
    for start in range(size + 1):
        for stop in range(start, size + 1):
            found = list(boxes(shape, start, stop - start))
            assert len(found) <= max(2 * len(shape) - 1, 1)
            parts = [whole[tuple(slice(o, o + e) for o, e in zip(*box, strict=True))] for box in found]
            assert [part.shape for part in parts] == [torch.Size(extent) for _, extent in found]
            flat = torch.cat([part.reshape(-1) for part in parts]) if parts else torch.empty(0)
            assert flat.tolist() == list(range(start, stop))


def test_a_tensor_without_elements_is_one_box() -> None:
    assert list(boxes((0, 4), 0, 0)) == [((0, 0), (0, 4))]
    assert list(boxes((3, 4), 5, 0)) == []


def test_boxes_are_views_of_the_buffer() -> None:
    buffer = torch.arange(20.0)
    held = Divided((4, 3), buffer.dtype)
    held.add(2, buffer[5:12])  # elements 2 to 9: the end of row 0, rows 1 and 2
    assert {begin: box.tolist() for begin, box in held.boxes.items()} == {
        (0, 2): [[5.0]],
        (1, 0): [[6.0, 7.0, 8.0], [9.0, 10.0, 11.0]],
    }
    held.boxes[1, 0].fill_(-1)
    assert buffer[6:12].eq(-1).all()
    assert buffer[5] == 5


def test_stretches_of_a_rectangle_are_moved_to_where_it_is() -> None:
    buffer = torch.arange(20.0)
    held = Divided((9, 8), buffer.dtype)
    held.add(2, buffer[:7], ((4, 5), (4, 3)))  # of rows 4 to 7, columns 5 to 7
    assert {begin: box.tolist() for begin, box in held.boxes.items()} == {
        (4, 7): [[0.0]],
        (5, 5): [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]],
    }


def test_a_rank_without_a_share_has_no_box_unless_there_is_nothing_to_share() -> None:
    nothing = torch.empty(0)
    held = Divided((13, 7), nothing.dtype)
    held.add(0, nothing, ((0, 0), (0, 7)))
    assert held.boxes == {}
    held = Divided((0, 4), nothing.dtype)
    held.add(0, nothing, ((0, 0), (0, 4)))
    assert list(held.boxes) == [(0, 0)]
