"""Who writes a rectangle of a parameter that several ranks along ``tp`` have, each cut over data ranks in its own way.

Ranks along ``tp`` with the same rectangle hold equal values, but their flat buffers differ in size where vocabulary or
heads are not divided evenly, and then the same parameter is cut at other places. The ranks of one place on ``tp`` hold
each element once; so for each such rectangle one place is chosen, and what the others hold of it is not written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from torch.distributed.checkpoint.planner import SavePlan

from camshaft_checkpoint.boxes import Place

Rectangle = tuple[Place, Place]
Copied = Mapping[str, Rectangle]
"""Offset and extent of the rectangle that a rank has a copy of, by checkpoint name."""


def keep_one(plans: Sequence[SavePlan], copied: Sequence[Copied], place: Callable[[int], int]) -> list[SavePlan]:
    """Every rank's plan without what a rank of another place on ``tp`` writes; the places take turns.

    ``copied`` tells of each rank which rectangles it shares, ``place`` where on ``tp`` a rank is.
    """
    holders: dict[tuple[str, Rectangle], set[int]] = {}
    for rank, rectangles in enumerate(copied):
        for each in rectangles.items():
            holders.setdefault(each, set()).add(place(rank))
    writers = {each: sorted(holders[each])[number % len(holders[each])] for number, each in enumerate(sorted(holders))}

    def writes(rank: int, name: str) -> bool:
        rectangle = copied[rank].get(name)
        return rectangle is None or writers[name, rectangle] == place(rank)

    return [
        dataclasses.replace(plan, items=[item for item in plan.items if writes(rank, item.index.fqn)])
        for rank, plan in enumerate(plans)
    ]
