"""Lion as Chen et al. (arXiv:2302.06675, algorithm 2) write it, for proofs; shares nothing with the plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from camshaft_lion import Options


def rate(options: Options) -> float:
    """The peak rate."""
    return options.lr


def update(
    options: Options, name: str, role: str, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], factor: float
) -> Tensor:
    """The weight after one step; ``state`` has ``exp_avg`` afterwards."""
    (beta1, beta2), mean = options.betas, state.get("exp_avg", torch.zeros_like(weight))
    direction = torch.sign(beta1 * mean + (1 - beta1) * gradient)
    state["exp_avg"] = beta2 * mean + (1 - beta2) * gradient
    decays = role == "matrix" or (role == "embedding" and options.decay_embeddings)
    return weight - options.lr * factor * (direction + (options.weight_decay if decays else 0.0) * weight)
