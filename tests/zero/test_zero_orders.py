"""Gradients of a window are the same whenever they are summed, and in whatever legal order it runs."""

import pytest
from zero_cases import assert_parity, reference, train

from camshaft.plugin import Plugin, hookimpl
from camshaft.program import Action, Kind

ORDERS = {
    "all forwards first": "F0 F1 F2 B0 B1 B2",
    "last forward first": "F0 F1 F2 B2 B1 B0",
    "mixed": "F0 B0 F1 F2 B2 B1",
    "interleaved": "F2 F0 B2 F1 B0 B1",
}


class Ordered(Plugin):
    """Owns ``schedule``: a fixed order of forwards and backwards of three microbatches."""

    def __init__(self, words):
        super().__init__()
        self.words = words.split()

    @hookimpl
    def schedule(self):
        body = [Action(Kind[word[0]], int(word[1:])) for word in self.words]
        return (*body, Action(Kind.REDUCE), Action(Kind.CLIP), Action(Kind.STEP))


CASES = [
    ("1", 2, "all forwards first", "picky"),
    ("2", 2, "all forwards first", "tied frozen, unused"),
    ("2", 2, "last forward first", "picky"),
    ("3", 2, "all forwards first", "picky"),
    ("3", 2, "mixed", "picky"),
    ("3", 2, "interleaved", "frozen"),
    ("3 kept", 2, "all forwards first", "plain"),
    ("hybrid 3", 4, "mixed", "picky"),
]


@pytest.mark.parametrize(("row", "ranks", "order", "variant"), CASES)
def test_any_legal_order_gives_the_same_sums(make_recipe, row, ranks, order, variant):
    case = {"variant": variant, "steps": 6}
    if ranks == 4:
        case["sections"] = {"batch": {"micro_batch_size": 1, "global_batch_size": 12}}
    records = train(make_recipe, row, ranks, 3, extra={"order": Ordered(ORDERS[order])}, **case)[0]
    assert_parity(records, reference(make_recipe, variant=variant, steps=6), "fp64")


@pytest.mark.parametrize(("row", "overlap"), [("2", False), ("3", True)])
def test_each_and_last_are_the_same_numbers(make_recipe, row, overlap):
    each, last = (
        train(make_recipe, row, 2, 6, variant="picky", steps=6, reduce=reduce, overlap=overlap)[0]
        for reduce in ("each", "last")
    )
    assert_parity(each, last, "fp64")
