"""Adafactor without factors (Shazeer and Stern, arXiv:1804.04235, algorithm 6); shares nothing with the plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from camshaft_adafactor import Options


def rate(options: Options) -> float:
    """The peak rate."""
    return options.lr


def update(
    options: Options, name: str, role: str, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], factor: float
) -> Tensor:
    """The weight after one step; ``state`` has ``step`` and ``exp_avg_sq`` afterwards."""
    lr = options.lr * factor
    time = state["step"] = state.get("step", torch.zeros(())) + 1
    kept = 1 - float(time) ** -options.decay_exponent
    square = kept * state.get("exp_avg_sq", torch.zeros_like(weight)) + (1 - kept) * (gradient**2 + options.eps)
    state["exp_avg_sq"] = square
    move = gradient / square.sqrt()
    if options.clip_threshold is not None:
        move = move / max(1.0, _size(move) / options.clip_threshold)
    if options.scale_by_weights:
        move = move * max(options.least_scale, _size(weight))
    decays = role == "matrix" or (role == "embedding" and options.decay_embeddings)
    updated: Tensor = weight - lr * (options.weight_decay if decays else 0.0) * weight - lr * move
    return updated


def _size(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
