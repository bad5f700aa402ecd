"""LAMB as You et al. (arXiv:1904.00962, algorithm 2) write it, with bias correction; shares nothing with the plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from camshaft_lamb import Options


def rate(options: Options) -> float:
    """The peak rate."""
    return options.lr


def update(
    options: Options, name: str, role: str, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], factor: float
) -> Tensor:
    """The weight after one step; ``state`` has ``step``, ``exp_avg`` and ``exp_avg_sq`` afterwards."""
    (beta1, beta2), zeros = options.betas, torch.zeros_like(weight)
    vector = role in ("norm", "bias")
    time = state["step"] = state.get("step", torch.zeros(())) + 1
    mean = state["exp_avg"] = beta1 * state.get("exp_avg", zeros) + (1 - beta1) * gradient
    square = state["exp_avg_sq"] = beta2 * state.get("exp_avg_sq", zeros) + (1 - beta2) * gradient**2
    root = (square / (1 - beta2 ** float(time))).sqrt() + options.eps
    direction = mean / (1 - beta1 ** float(time)) / root + (0.0 if vector else options.weight_decay) * weight
    long, short = float(weight.norm()), float(direction.norm())
    ratio = long / short if long and short and not (vector and options.exempt_vectors) else 1.0
    ratio = ratio if options.max_ratio is None else min(ratio, options.max_ratio)
    updated: Tensor = weight - options.lr * factor * ratio * direction
    return updated
