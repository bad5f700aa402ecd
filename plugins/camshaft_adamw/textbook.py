"""AdamW as Loshchilov and Hutter (arXiv:1711.05101, algorithm 2) write it; shares nothing with the plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from camshaft_adamw import Options


def rate(options: Options) -> float:
    """The peak rate."""
    return options.lr


def update(
    options: Options, name: str, role: str, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], factor: float
) -> Tensor:
    """The weight after one step; ``state`` has ``step``, ``exp_avg`` and ``exp_avg_sq`` afterwards."""
    (beta1, beta2), lr = options.betas, options.lr * factor
    zeros = torch.zeros_like(weight)
    time = state["step"] = state.get("step", torch.zeros(())) + 1
    mean = state["exp_avg"] = beta1 * state.get("exp_avg", zeros) + (1 - beta1) * gradient
    square = state["exp_avg_sq"] = beta2 * state.get("exp_avg_sq", zeros) + (1 - beta2) * gradient * gradient
    mean, square = mean / (1 - beta1 ** float(time)), square / (1 - beta2 ** float(time))
    decays = role == "matrix" or (role == "embedding" and options.decay_embeddings)
    decay = options.weight_decay if decays else 0.0
    updated: Tensor = weight - lr * (mean / (square.sqrt() + options.eps) + decay * weight)
    return updated
