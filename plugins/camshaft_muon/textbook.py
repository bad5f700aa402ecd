"""Muon as Jordan et al. (2024) and Liu et al. (arXiv:2502.16982) write it; shares nothing with the plugin."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from camshaft_muon import AdamW, Options

POLYNOMIAL = (3.4445, -4.7750, 2.0315)


def rate(options: Options) -> float:
    """The peak rate of hidden matrices."""
    return options.lr


def update(
    options: Options, name: str, role: str, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], factor: float
) -> Tensor:
    """The weight after one step; ``state`` has ``momentum_buffer``, or what AdamW keeps, afterwards."""
    if role != "matrix" or weight.ndim != 2 or any(fnmatchcase(name, glob) for glob in options.exclude):
        return _adamw(options.adamw, role, weight, gradient, state, factor)
    lr, kept = options.lr * factor, options.momentum
    mean = kept * state.get("momentum_buffer", torch.zeros_like(weight)) + (1 - kept) * gradient
    state["momentum_buffer"] = mean
    rows, columns = weight.shape
    size = max(1.0, rows / columns) ** 0.5 if options.scaling == "original" else 0.2 * math.sqrt(max(rows, columns))
    move = orthogonal((1 - kept) * gradient + kept * mean if options.nesterov else mean, options.iterations)
    return weight - lr * options.weight_decay * weight - lr * size * move


def orthogonal(matrix: Tensor, iterations: int) -> Tensor:
    """About U V' of the singular value decomposition U S V', by an odd polynomial of the matrix."""
    a, b, c = POLYNOMIAL
    found = matrix / max(float(matrix.norm()), 1e-7)
    for _ in range(iterations):
        square = found @ found.T
        found = a * found + (b * square + c * square @ square) @ found
    return found


def _adamw(
    options: AdamW, role: str, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], factor: float
) -> Tensor:
    """Loshchilov and Hutter, arXiv:1711.05101, algorithm 2."""
    (beta1, beta2), zeros = options.betas, torch.zeros_like(weight)
    time = state["step"] = state.get("step", torch.zeros(())) + 1
    mean = state["exp_avg"] = beta1 * state.get("exp_avg", zeros) + (1 - beta1) * gradient
    square = state["exp_avg_sq"] = beta2 * state.get("exp_avg_sq", zeros) + (1 - beta2) * gradient**2
    root = (square / (1 - beta2 ** float(time))).sqrt() + options.eps
    decay = options.weight_decay if role in ("matrix", "embedding") else 0.0
    updated: Tensor = weight - options.lr * factor * (mean / (1 - beta1 ** float(time)) / root + decay * weight)
    return updated
