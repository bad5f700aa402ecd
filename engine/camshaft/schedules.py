"""Pipeline schedules that packages offer: entry points in the group ``camshaft.schedules``, name to ``Offer``.

A recipe names one where it names a shipped schedule. An order is of computations alone: the owner of the slot
``schedule`` puts in the transfers, closes the window, and checks the whole before anything runs. Nothing here imports
torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from camshaft.errors import PluginError
from camshaft.host import by_name, imported
from camshaft.program import Action

GROUP = "camshaft.schedules"

Order = Callable[[int, int, int, int], Sequence[Action]]
"""``order(rank, ranks, microbatches, v)``: what ``rank`` computes, in which order, with ``v`` stages on each rank. Of
each microbatch F, then B (or I and W), in each of the rank's stages, which are numbered over the whole pipeline. Pure:
every rank makes the orders of all.
"""


@dataclass(frozen=True)
class Offer:
    """A schedule as a package offers it."""

    order: Order
    peak: Callable[[int, int, int, int], int] | None = None
    """Of the same numbers as ``order``: the most activations that ``rank`` holds at once; the check holds it to that.
    None: nothing is promised."""
    least: int = 1
    """Virtual stages that a rank has at least."""
    most: int | None = 1
    """And at most; None for any number."""
    v_shaped: bool = False
    """Rank r holds stages r and 2 ranks - 1 - r; otherwise r, r + ranks, ..."""


@cache
def offered() -> Mapping[str, EntryPoint]:
    """Entry points of installed schedules by name. Nothing is imported.

    Raises:
        MachineError: two packages offer the same name.
    """
    return by_name(entry_points(group=GROUP), "schedule")


def load(name: str) -> Offer:
    """Import the schedule called ``name``, one of ``offered``.

    Raises:
        PluginError: it cannot be imported, or is no ``Offer``.
    """
    point = offered()[name]
    loaded = imported(point)
    if not isinstance(loaded, Offer):
        raise PluginError(name, "import", f"{point.value} is not a camshaft.schedules.Offer")
    return loaded
