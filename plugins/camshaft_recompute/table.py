"""What a forward keeps under recomputation, by the table that ``camshaft plan`` has without it. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from camshaft.activations import Kept
    from camshaft.estimate import Sizes
    from camshaft_recompute.options import Options


def changed(options: Options, sizes: Sizes, kept: tuple[Kept, ...]) -> tuple[Kept, ...]:
    return kept
