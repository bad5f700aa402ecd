"""How many ranks have each element is counted, and whoever tells another number is named: not who goes by it."""

from dataclasses import replace
from importlib.metadata import EntryPoint

import pytest
from verify_recipes import recipe

from camshaft import Plugin, hookimpl, host
from camshaft.parts import Box, Piece
from camshaft.verify import copies
from camshaft.verify.examine import verify

WHOLE = (4, 6)


def stretch(start, length, box=None, shape=WHOLE):
    return Piece("w", shape, start, 0, length, box)


def columns(begin, end, count=1):
    """A rectangle of all rows: not one stretch of the whole parameter."""
    return stretch(0, 4 * (end - begin), Box(WHOLE, (0, begin), count), (4, end - begin))


RIGHT = {
    "one rank": [stretch(0, 24)],
    "stretches": [stretch(0, 10), stretch(10, 14)],
    "rectangles": [columns(0, 2), columns(2, 6)],
    "two pairs": [columns(0, 3, 2), columns(0, 3, 2), columns(3, 6, 2), columns(3, 6, 2)],
    "stretches of copies": [
        stretch(0, 10, Box(WHOLE, (0, 0), 2)), stretch(10, 14, Box(WHOLE, (0, 0), 2)),
        stretch(0, 20, Box(WHOLE, (0, 0), 2)), stretch(20, 4, Box(WHOLE, (0, 0), 2)),
    ],
    "an empty one": [columns(0, 6), stretch(24, 0)],
}  # fmt: skip
WRONG = {
    "held twice, told once": [stretch(0, 24), stretch(0, 24)],
    "held once, told twice": [columns(0, 3, 2), columns(3, 6, 2)],
    "one of two says so": [columns(0, 6, 2), columns(0, 6, 1)],
    "rectangles that overlap": [columns(0, 4), columns(3, 6)],
    "told three times": [columns(0, 6, 3), columns(0, 6, 3)],
}


@pytest.mark.parametrize("case", RIGHT)
def test_what_is_told_is_so(case):
    assert list(copies.faults(list(enumerate(RIGHT[case])))) == []


@pytest.mark.parametrize("case", WRONG)
def test_another_number_than_there_are_is_told(case):
    (line,) = copies.faults(list(enumerate(WRONG[case])))
    assert line.startswith("elements of 'w' lie on ")


class Miscounts(Plugin):
    """Changes what another plugin told of a parameter, without a claim."""

    @hookimpl
    def shard_storage(self, world):
        for name, box in world.boxes.items():
            if box.copies > 1:
                world.boxes[name] = replace(box, copies=1)


def test_who_spoils_another_plugins_word_is_named(tmp_path, monkeypatch):
    """The word is about an axis that `tensor_parallel` divides, and `clip` goes by it: neither is to blame."""
    points = {**host.installed(), "miscounts": EntryPoint("miscounts", f"{__name__}:Miscounts", host.GROUP)}
    monkeypatch.setattr(host, "installed", lambda: points)
    plain = recipe(tmp_path, "tp")
    plugins = {**plain.tree["plugins"], "miscounts": {}}
    report = verify(recipe(tmp_path, "tp", plugins=plugins))
    assert report.finding is not None and report.finding.plugins == ("miscounts",), f"{report.finding}"
    assert report.finding.smallest == ("tensor_parallel", "miscounts"), f"{report.finding}"
    assert "lie on 2 ranks" in str(report.finding.sign) and "is told of 1" in str(report.finding.sign)
