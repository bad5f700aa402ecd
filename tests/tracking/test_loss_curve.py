from __future__ import annotations

import math

import pytest

from camshaft_console.curve import draw

FALLING = [(0, 4.0), (1, 3.0), (2, 2.0), (3, 1.0)]


def test_an_exact_small_drawing_in_ascii():
    assert draw(FALLING, [(3, 1.5)], width=4, height=4, ascii_only=True) == [
        "  4 |*",
        "    | *",
        "2.5 |  *",
        "  1 |   o",
        "    +----",
        "     0  3",
        "loss over steps: * train o eval",
    ]


def test_an_exact_small_drawing_in_braille():
    assert draw(FALLING, width=4, height=2, ascii_only=False) == [
        "  4 ┤⠑⢄",
        "2.5 ┤  ⠑⢄",
        "    └────",
        "     0  3",
        "loss over steps: ⠒ train",
    ]


def test_gaps_between_points_are_straight_lines():
    lines = draw([(0, 0.0), (8, 8.0)], width=9, height=9, ascii_only=True)
    assert [line.split("|")[1].find("*") for line in lines[:9]] == [8, 7, 6, 5, 4, 3, 2, 1, 0]


def test_a_jump_is_drawn_as_a_joined_stroke():
    lines = draw([(0, 0.0), (1, 0.0), (2, 9.0), (3, 9.0)], width=4, height=6, ascii_only=True)
    columns = list(zip(*(f"{line.split('|')[1]:<4}" for line in lines[:6]), strict=True))
    assert ["".join(column) for column in columns] == ["     *", "     *", "***** ", "*     "]


def test_points_of_one_column_are_averaged():
    points = [(0, 2.0), (1, 0.0), (2, 2.0), (3, 0.0), (4, 2.0), (5, 0.0)]
    lines = draw(points, [(0, 2.0), (5, 0.0)], width=3, height=3, ascii_only=True)
    assert [line.split("|")[1] for line in lines[:3]] == ["o", "***", "  o"]


def test_values_that_are_not_finite_are_left_out():
    points = [(0, 4.0), (1, math.nan), (2, math.inf), (3, 1.0)]
    assert draw(points, width=4, height=4, ascii_only=True) == draw(
        [(0, 4.0), (3, 1.0)], width=4, height=4, ascii_only=True
    )


@pytest.mark.parametrize("points", [[], [(5, 1.0)], [(5, math.nan), (6, math.nan)]])
def test_fewer_than_two_points_make_no_drawing(points):
    assert draw(points, ascii_only=True) == []


def test_a_flat_curve_and_one_step_do_not_divide_by_zero():
    assert draw([(0, 2.0), (9, 2.0)], width=5, height=3, ascii_only=True)[0] == "2 |*****"
    assert draw([(7, 2.0)], [(7, 3.0)], width=5, height=3, ascii_only=True)[0] == "  3 |o"


def test_evaluation_alone_is_drawn():
    lines = draw([], [(0, 3.0), (10, 1.0)], width=5, height=3, ascii_only=True)
    assert lines[0] == "3 |o"
    assert lines[2] == "1 |    o"
    assert lines[-1] == "loss over steps: o eval"


@pytest.mark.parametrize("ascii_only", [True, False])
def test_every_line_fits_its_width_and_the_labels_are_the_extremes(ascii_only):
    points = [(step, 10.4871 * math.exp(-step / 5000) + math.sin(step)) for step in range(0, 60_000, 10)]
    lines = draw(points, [(60_000, 1.0)], width=60, height=10, ascii_only=ascii_only)
    margin = len(lines[0].split("|" if ascii_only else "┤")[0])
    assert max(map(len, lines[:-1])) <= margin + 1 + 60
    low, high = min(value for _, value in points), max(value for _, value in points)
    assert float(lines[9][: margin - 1]) == pytest.approx(low, abs=1e-3)
    assert float(lines[0][: margin - 1]) == pytest.approx(high, abs=1e-2)
    assert lines[-2].split() == ["0", "60000"]
    assert "".join(lines).isascii() is ascii_only
