"""Dropout on a part of what one process has: the mask of the whole is drawn on every rank, and each takes its own part.

Ranks that have the same samples draw from the same generator, so they draw one mask, and the numbers are those of one
process. It costs the whole mask's memory for a moment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from camshaft_tensor_parallel.line import Line

Forward = Callable[[Tensor], Tensor]


def on_tokens(dropout: Any, line: Line) -> Forward:
    """A forward for this rank's tokens [1, m, ...]; what has all tokens is dropped as ever."""
    plain: Forward = dropout.forward

    def forward(hidden: Tensor) -> Tensor:
        if not _drops(dropout) or hidden.shape[:2] != (1, line.share):
            return plain(hidden)
        mask = _mask((line.rows, line.length, *hidden.shape[2:]), hidden, dropout.p).flatten(0, 1)
        own = mask[line.rank * line.share : (line.rank + 1) * line.share]
        missing = line.share - len(own)
        if missing:  # padding
            own = torch.cat((own, own.new_zeros(missing, *own.shape[1:])))
        return hidden * own.unsqueeze(0)

    return forward


def on_features(dropout: Any, line: Line) -> Forward:
    """A forward for this rank's stretch of the last dimension, which later ranks go on."""
    stretches: dict[int, tuple[int, int]] = {}

    def forward(features: Tensor) -> Tensor:
        if not _drops(dropout):
            return features
        width = features.shape[-1]
        if width not in stretches:
            stretches[width] = _stretch(width, features.device, line)
        start, total = stretches[width]
        mask = _mask((*features.shape[:-1], total), features, dropout.p)
        return features * mask[..., start : start + width]

    return forward


def _drops(dropout: Any) -> bool:
    return bool(dropout.training and dropout.p > 0.0)


def _mask(shape: tuple[int, ...], like: Tensor, p: float) -> Tensor:
    """0 or 1 / (1 - p), as torch draws them for a tensor of ``shape``."""
    return F.dropout(torch.ones(shape, dtype=like.dtype, device=like.device), p)


def _stretch(width: int, device: torch.device, line: Line) -> tuple[int, int]:
    """Where this rank's ``width`` features begin, and how many all ranks have. Collective, once for each width."""
    widths = torch.zeros(line.size, dtype=torch.int64, device=device)
    widths[line.rank] = width
    found: list[int] = line.all_reduce(widths, "forward").tolist()
    return sum(found[: line.rank]), sum(found)
