"""Dropout on a part of what one process has: the mask of the whole is drawn on every rank, and each takes its own part.

Ranks that have the same samples draw from the same generator, so they draw one mask, and the numbers are those of one
process. It costs the whole mask's memory for a moment.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from camshaft_tensor_parallel.shares import Stretch, Tokens

Draw = Callable[..., Tensor]


def masked(draw: Draw, own: Tensor, rate: float, share: Tokens | Stretch, inplace: bool) -> Tensor:
    """``own`` times its part of the mask (0 or 1 / (1 - rate)) that ``draw(ones, rate, True)`` makes of the whole."""
    mask = share.take(draw(share.blank(own.detach(), 1.0), rate, True))
    # Autograd keeps the mask in a shape that no plain dropout keeps: where a checkpoint of the user's own runs a
    # function again outside of this plugin's forwards, with another mask, torch sees another shape and refuses.
    made = (own.unsqueeze(0) * mask.unsqueeze(0)).squeeze(0)
    return own.copy_(made) if inplace else made
