"""Dao et al. (FlashAttention-2, arXiv:2307.08691) from the package ``flash_attn``: GPUs, 16 bit dtypes."""

from __future__ import annotations

from typing import Any

from flash_attn import flash_attn_func, flash_attn_varlen_func
from torch import Tensor

from camshaft_kernels.providers.documents import Spans, spans


def attention() -> dict[str, Any]:
    """Causal attention; grouped heads are taken as they are."""
    return {"attention": _causal}


def document_attention() -> dict[str, Any]:
    """All documents of a batch in one call."""
    return {"document_mask": spans, "document_attention": _in_documents}


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mixed: Tensor = flash_attn_func(q, k, v, causal=True)
    return mixed


def _in_documents(q: Tensor, k: Tensor, v: Tensor, mask: Spans) -> Tensor:
    bounds, longest = mask
    flat = [each.flatten(0, 1) for each in (q, k, v)]
    mixed: Tensor = flash_attn_varlen_func(*flat, bounds, bounds, longest, longest, causal=True)
    return mixed.view(q.shape)
