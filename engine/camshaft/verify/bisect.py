"""Taking plugins away one after another until only those are left without which the numbers are right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from camshaft.errors import RecipeError
from camshaft.verify.judge import Comparison, Deviation
from camshaft.verify.runs import Failure, Unequal

if TYPE_CHECKING:
    from camshaft.verify.examine import Bench

MAKERS = {
    "norm": "clip", "clipped": "clip", "coefficient": "clip", "lr": "lr", "optimizer": "optimizer",
    "weights": "optimizer",
}  # fmt: skip
"""Quantity to the slot whose owner makes it of the quantities before it."""

Sign = Deviation | Failure | Unequal


def blame(bench: Bench, sign: Sign) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The plugins to blame for ``sign``, and the smallest set that still shows something wrong, in recipe order.

    A plugin is taken away with the axes that it alone works along; what remains trains the same windows. One whose
    removal is not legal stays; in the place of the optimizer there is another one. The set is minimal: without any one
    of its members the numbers are right.
    """
    left = list(bench.sorted.all)
    for name in _order(bench):
        without = [other for other in left if other != name]
        found = _look(bench, without)
        if found is not None and (_refused(sign) or not _refused(found)):
            left, sign = without, found
    smallest = tuple(name for name in bench.small.sections if name in left)
    return _named(bench, sign, smallest), smallest


def _refused(sign: Sign) -> bool:
    """Whether a recipe is not legal, which only shows when it meets the model."""
    return isinstance(sign, Failure) and sign.refused


def _order(bench: Bench) -> Sequence[str]:
    """What is least likely to be at fault goes first: what the plain process has too, then recipe order from behind."""
    return [*bench.sorted.kept, *reversed(bench.sorted.compared)]


def _look(bench: Bench, names: Sequence[str]) -> Sign | None:
    """What is wrong with ``names`` alone; None if nothing is, or if they are not legal."""
    try:
        found = bench.look(names)
    except RecipeError:
        return None
    return None if isinstance(found, Comparison) else found


def _named(bench: Bench, sign: Sign, smallest: Sequence[str]) -> tuple[str, ...]:
    """Those of ``smallest`` to name: who raised, else who makes the quantity, else all that is compared. Of a wrong
    word about how parameters lie, who divides them is only to blame if nobody else has to be there for it.
    """
    if isinstance(sign, Failure) and sign.plugin in smallest:
        return (sign.plugin,)
    slot = "" if isinstance(sign, Failure) else MAKERS.get(sign.quantity, "")
    maker = bench.owners.get(slot, "")
    if maker in smallest:
        return (maker,)
    compared = tuple(name for name in smallest if name in bench.sorted.compared)
    if isinstance(sign, Failure) and sign.told:
        compared = tuple(name for name in compared if not bench.sorted.axes.get(name)) or compared
    return compared or tuple(smallest)
