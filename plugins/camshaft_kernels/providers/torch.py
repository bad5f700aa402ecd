"""Operations in plain torch that are better than the model's own form on some machines, for any dtype and device."""

from __future__ import annotations

from typing import Any

from camshaft_kernels.providers.chunked import linear_cross_entropy
from camshaft_kernels.providers.documents import segment_attention, segments, spans, varlen_attention


def own() -> dict[str, Any]:
    """What ``camshaft.ops.Ops`` starts with, or what the optimizer does by itself: nothing is replaced."""
    return {}


def in_chunks() -> dict[str, Any]:
    """Projection and loss in chunks of tokens."""
    return {"linear_cross_entropy": linear_cross_entropy}


def by_segments() -> dict[str, Any]:
    """A plain causal attention for each document."""
    return {"document_mask": segments, "document_attention": segment_attention}


def varlen() -> dict[str, Any]:
    """All documents of a batch in one call of torch's own kernel for sequences of different lengths."""
    return {"document_mask": spans, "document_attention": varlen_attention}


def grouped() -> dict[str, Any]:
    """torch's product of several pairs of matrices in one call."""
    import torch.nn.functional as F

    return {"grouped_matmul": F.grouped_mm}
