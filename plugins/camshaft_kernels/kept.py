"""What fused operations do not keep for backward, for ``camshaft plan``. Pure, and without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from camshaft.activations import Kept
    from camshaft.claims import PlanContext
    from camshaft.estimate import Sizes


def change(
    kept: tuple[Kept, ...], wishes: Mapping[str, str], context: PlanContext, sizes: Sizes, name: str
) -> tuple[Kept, ...]:
    """``kept`` as it is with the chosen implementations."""
    return kept
