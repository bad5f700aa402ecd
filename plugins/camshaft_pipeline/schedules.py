"""Schedules by name, those that are shipped and those that other packages offer: pure functions of (ranks,
microbatches, virtual stages).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from camshaft.errors import CamshaftError
from camshaft.program import Action
from camshaft.schedules import load, offered
from camshaft_pipeline import orders, orders_v
from camshaft_pipeline.errors import ScheduleError
from camshaft_pipeline.schedule import Schedule, loop_placement, v_placement
from camshaft_pipeline.transfers import complete

Order = Callable[[int, int, int, int], Sequence[Action]]
Peak = Callable[[int, int, int, int], int]


@dataclass(frozen=True)
class Family:
    """One kind of schedule: ``order(rank, ranks, microbatches, v)`` and ``peak`` of the same, the activations it holds.

    ``least`` and ``most`` bound the virtual stages a rank may have; ``v_shaped`` says how stages are placed.
    """

    order: Order
    peak: Peak | None
    least: int = 1
    most: int | None = 1
    v_shaped: bool = False
    splits_backward: bool = False
    fix: str = ""


FAMILIES: dict[str, Family] = {
    "gpipe": Family(orders.breadth_first, lambda rank, p, m, v: v * m, most=None),
    "1f1b": Family(
        orders.one_forward_one_backward,
        lambda rank, p, m, v: min(p - rank, m),
        fix="use interleaved_1f1b for several virtual stages a rank",
    ),
    "interleaved_1f1b": Family(
        orders.interleaved,
        lambda rank, p, m, v: min(2 * (p - rank) - 1 + (v - 1) * orders.rounds(p, m)[0], v * m),
        least=2,
        most=None,
        fix="use 1f1b for one virtual stage a rank",
    ),
    "zb_h1": Family(orders.zb_h1, lambda rank, p, m, v: min(p, m), splits_backward=True),
    "zbv": Family(
        orders_v.zbv,
        lambda rank, p, m, v: min(2 * p, m + 1 + rank, 2 * m),
        least=2,
        most=2,
        v_shaped=True,
        splits_backward=True,
    ),
    "dualpipe_v": Family(
        orders_v.dualpipe_v,
        lambda rank, p, m, v: min(2 * p + 1, m + 1 + rank, 2 * m),
        least=2,
        most=2,
        v_shaped=True,
        splits_backward=True,
    ),
}

LONGEST = 2**18
"""Forwards of a window, on all ranks: longer ones would take minutes to make and to check."""


@lru_cache(maxsize=8)
def make(name: str, ranks: int, microbatches: int, virtual_stages: int | None = None) -> Schedule:
    """The schedule ``name`` for ``ranks`` ranks with ``virtual_stages`` each (None: the fewest it can have).

    Raises:
        ScheduleError: there is none of that name, or none for these numbers.
    """
    family = FAMILIES.get(name) or _offered(name)
    v = family.least if virtual_stages is None else virtual_stages
    _check_numbers(name, family, ranks, microbatches, v)
    placement = v_placement(ranks) if family.v_shaped else loop_placement(ranks, v)
    peak = family.peak
    try:
        orders = [list(family.order(rank, ranks, microbatches, v)) for rank in range(ranks)]
        peaks = None if peak is None else tuple(peak(rank, ranks, microbatches, v) for rank in range(ranks))
    except CamshaftError:
        raise
    except Exception as error:
        raise ScheduleError(f"{name} failed for {ranks} ranks and {microbatches} microbatches: {error!r}") from error
    return complete(name, placement, orders, peaks)


def _offered(name: str) -> Family:
    """The schedule of another package."""
    if name not in offered():
        known = [*FAMILIES, *offered()]
        near = difflib.get_close_matches(name, known, n=1)
        fix = f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}"
        raise ScheduleError(f"there is no schedule '{name}'", fix=fix)
    offer = load(name)
    return Family(offer.order, offer.peak, offer.least, offer.most, offer.v_shaped)


def _check_numbers(name: str, family: Family, ranks: int, microbatches: int, v: int) -> None:
    if ranks < 1 or microbatches < 1:
        raise ScheduleError(f"a schedule needs ranks and microbatches, got {ranks} and {microbatches}")
    if ranks * microbatches * v > LONGEST:
        raise ScheduleError(
            f"{ranks} ranks, {microbatches} microbatches and {v} virtual stages a rank make {ranks * microbatches * v} "
            f"forwards, and a schedule has {LONGEST} at most",
            fix="raise batch.micro_batch_size, or lower batch.global_batch_size",
        )
    if v < family.least or (family.most is not None and v > family.most):
        bound = f"{family.least}" if family.most == family.least else f"at least {family.least}"
        fix = family.fix or f"set virtual_stages to {family.least}, or leave it out"
        raise ScheduleError(f"{name} has {bound} virtual stages a rank, got {v}", fix=fix)
