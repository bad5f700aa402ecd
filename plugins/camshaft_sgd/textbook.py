"""SGD with momentum as Sutskever et al. (ICML 2013) write it, in torch's form; shares nothing with the plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from camshaft_sgd import Options


def rate(options: Options) -> float:
    """The peak rate."""
    return options.lr


def update(
    options: Options, name: str, role: str, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], factor: float
) -> Tensor:
    """The weight after one step; with momentum ``state`` has ``momentum_buffer`` afterwards."""
    slope = gradient + (options.weight_decay if role in ("matrix", "embedding") else 0.0) * weight
    move, kept = slope, options.momentum
    if kept:
        move = state["momentum_buffer"] = kept * state.get("momentum_buffer", torch.zeros_like(weight)) + slope
        move = slope + kept * move if options.nesterov else move
    return weight - options.lr * factor * move
