"""NVIDIA's Transformer Engine: attention (cuDNN or FlashAttention, as it decides) and cross-entropy.

Its norms and rotations are modules with weights and angles of their own, not functions of ours.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformer_engine.pytorch import DotProductAttention
from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

from camshaft.ops import IGNORED
from camshaft_kernels.devices import on_device_of


def attention() -> dict[str, Any]:
    """Causal attention with grouped heads."""
    return {"attention": _causal}


def cross_entropy() -> dict[str, Any]:
    """Sum of cross-entropies, its gradient in place of a copy of the logits."""
    return {"cross_entropy": _cross_entropy}


@cache
def _module(heads: int, groups: int, width: int) -> Any:
    """The module for these sizes: it has no parameters."""
    return DotProductAttention(
        heads, width, num_gqa_groups=groups, attention_dropout=0.0, qkv_format="bshd", attn_mask_type="causal"
    )


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with on_device_of(q):
        mixed: Tensor = _module(q.shape[2], k.shape[2], q.shape[3])(q, k, v)  # [b, s, n d]
    return mixed.view(q.shape)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    wide = logits.to(torch.float32, copy=True)  # the gradient is written over it
    with on_device_of(logits):
        losses: Tensor = parallel_cross_entropy(wide, labels, 0.0, False, None, IGNORED)
    return losses.sum()
