"""Orthogonalisation by a quintic Newton-Schulz iteration (Jordan et al. 2024)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of x, x^3 and x^5: steep at 0, so that few iterations lift small singular values; they end between 0.7 and 1.2."""
EPS = 1e-7


def orthogonalize(matrix: Tensor, iterations: int) -> Tensor:
    """``matrix`` [m, n] with its singular values moved near 1, in its own dtype; a zero matrix stays zero.

    The Gram matrix is that of the shorter side.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if tall else matrix
    x = x / matrix.norm().clamp(min=EPS)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def cost(shape: tuple[int, ...]) -> float:
    """Multiplications of one iteration: two products with the long side, one of Gram matrices."""
    short, long = min(shape), max(shape)
    return float(short * short * (2 * long + short))


def scale(shape: tuple[int, ...], scaling: str) -> float:
    """Factor on the learning rate: Jordan's, or the one of Liu et al. (arXiv:2502.16982) that matches AdamW's RMS."""
    rows, columns = shape
    if scaling == "original":
        return math.sqrt(max(1.0, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))
