"""Both tables divided by vocabulary, and the cross-entropy of logits that no rank has all of: Shoeybi et al.
(arXiv:1909.08053), section 3."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from camshaft_tensor_parallel.division import bounds
from camshaft_tensor_parallel.line import Line

IGNORED = -100
"""Label of a token that is not counted."""


class Range(NamedTuple):
    """Tokens ``start`` to ``stop`` of a vocabulary of ``size``, which this rank has."""

    start: int
    stop: int
    size: int

    @classmethod
    def of(cls, size: int, line: Line) -> Range:
        """This rank's range, as its box has it."""
        return cls(*bounds(size, 1, line.size, line.rank), size)

    def places(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Row of each token in this rank's table, 0 for those of other ranks, and which ones these are.

        Tokens that no rank has are left to the first and the last one, where indexing fails on them.
        """
        away = torch.zeros_like(tokens, dtype=torch.bool)
        if self.start > 0:
            away |= tokens < self.start
        if self.stop < self.size:
            away |= tokens >= self.stop
        return (tokens - self.start).masked_fill_(away, 0), away


def cross_entropy(logits: Tensor, labels: Tensor, own: Range, line: Line) -> Tensor:
    """Sum of the tokens' cross-entropies, a scalar in fp32 or wider, equal on all ranks.

    Args:
        logits: [b, s, own.stop - own.start].
        labels: int64 [b, s]; -100 for tokens that are not counted.
        own: the part of the vocabulary that ``logits`` are of.
        line: to the ranks with the other parts. They exchange three numbers a token.
    """
    loss: Tensor = _CrossEntropy.apply(logits, labels, own, line)  # type: ignore[no-untyped-call]
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, own: Range, line: Line) -> Tensor:
        ctx.dtype, ctx.shape = logits.dtype, logits.shape
        labels = labels.reshape(-1)
        flat = logits.reshape(-1, logits.shape[-1]).to(torch.promote_types(logits.dtype, torch.float32))
        peak = line.all_reduce(flat.amax(-1), "forward", "max")
        shifted = flat - peak.unsqueeze(-1)
        ignored = labels == IGNORED
        places, away = own.places(labels.masked_fill(ignored, own.start))
        away |= ignored
        picked = shifted.gather(-1, places.unsqueeze(-1)).squeeze(-1).masked_fill_(away, 0.0)
        weights = shifted.exp_()
        totals, picked = line.all_reduce(torch.stack((weights.sum(-1), picked)), "forward").unbind()
        ctx.save_for_backward(weights.div_(totals.unsqueeze(-1)), places, away, ignored)
        return (totals.log() - picked).masked_fill_(ignored, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        weights, places, away, ignored = ctx.saved_tensors
        scale = gradient.expand(ignored.shape).masked_fill(ignored, 0.0)
        made = weights * scale.unsqueeze(-1)
        made.scatter_add_(-1, places.unsqueeze(-1), scale.masked_fill(away, 0.0).neg_().unsqueeze(-1))
        return made.view(ctx.shape).to(ctx.dtype), None, None, None
