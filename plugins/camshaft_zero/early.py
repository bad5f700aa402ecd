"""What follows from the sizes of a rank's parameters before anything is built. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from camshaft.errors import Problem
from camshaft_zero.costs import plan_groups

if TYPE_CHECKING:
    from camshaft.claims import PlanContext
    from camshaft.estimate import Sizes
    from camshaft_zero.options import Options
    from camshaft_zero.placement import Placement


def one_bucket(
    options: Options, placement: Placement, context: PlanContext, sizes: Sizes, key: str
) -> Iterator[Problem]:
    """The fault of a recipe that asks to overlap where all gradients of a rank's one stage are in one bucket.

    What is divided has units in place of buckets, and with one data rank nothing travels.
    """
    asked = options.provider == "native" and "overlap" in options.model_fields_set and options.overlap
    divided = placement.parameters and placement.shard is not None and context.mesh[placement.shard].degree > 1
    stages = {each.stage for each in sizes.parameters or () if each.trains}
    if not asked or divided or context.mesh["dp"].degree == 1 or len(stages) != 1:
        return
    groups = plan_groups(options, sizes, divided=False)
    if len(groups) == 1:
        size = groups[0].elements * sizes.widths.param / 2**20
        yield Problem(
            f"there is nothing to overlap: all gradients fit into one bucket, of {size:.3g} MiB",
            key=f"{key}.overlap",
            fix=f"lower {key}.bucket_size_mb, or remove overlap",
        )
