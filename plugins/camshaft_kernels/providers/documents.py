"""Attention inside of documents without a mask of [s, s]: memory and work go with the sum of squared document lengths.

Documents of a row follow one another, as packing lays them out: their numbers never fall along a row. Both forms look
at the documents once a forward on the host, which waits for the device.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Spans(NamedTuple):
    """Where documents begin in the tokens of all rows, one behind the other: int32 [documents + 1]."""

    bounds: Tensor
    row: int
    """Tokens of a row: no document is longer."""


def segments(document: Tensor) -> list[int]:
    """Lengths of all documents, row by row; ``document`` [b, s]."""
    bounds = spans(document).bounds.tolist()
    return [end - begin for begin, end in pairwise(bounds)]


def spans(document: Tensor) -> Spans:
    """Bounds of all documents of ``document`` [b, s].

    Raises:
        ValueError: numbers fall along a row, so a document may be in several pieces.
    """
    steps = document.diff(dim=1)
    if bool((steps < 0).any()):
        raise ValueError(
            "document numbers fall along a row: these documents may lie in pieces, which only the mask of "
            "plugins.kernels.document_attention=torch can tell"
        )
    begins = F.pad(steps != 0, (1, 0), value=True).flatten().nonzero().flatten()
    return Spans(_of_any_length(F.pad(begins, (0, 1), value=document.numel()).to(torch.int32)), document.shape[1])


def _of_any_length(bounds: Tensor) -> Tensor:
    """Let one compiled graph take any number of documents, where there are compiled ones: else each has its own."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and not torch.compiler.is_compiling():
        dynamo.maybe_mark_dynamic(bounds, 0)
    return bounds


def segment_attention(q: Tensor, k: Tensor, v: Tensor, mask: list[int]) -> Tensor:
    """As ``camshaft.ops.document_attention``, a causal attention for each document; ``mask`` from ``segments``."""
    grouped = q.shape[2] > k.shape[2]
    # split, not slices: its backward puts the parts together once, where each slice would fill a whole tensor.
    split = (torch.split(each.flatten(0, 1), mask) for each in (q, k, v))
    mixed = [_causal(one, other, values, grouped) for one, other, values in zip(*split, strict=True)]
    return torch.cat(mixed).view(q.shape)


def _causal(q: Tensor, k: Tensor, v: Tensor, grouped: bool) -> Tensor:
    """Attention in one document, [tokens, heads, d] each."""
    # A batch of one: without that dimension torch takes the form that stores all scores.
    q, k, v = (each.transpose(0, 1).unsqueeze(0) for each in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).squeeze(0).transpose(0, 1)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, mask: Spans) -> Tensor:
    """The same by ``torch.nn.attention.varlen``, for CUDA and 16 bit dtypes; ``mask`` from ``spans``."""
    from torch.nn.attention.varlen import varlen_attn

    group = q.shape[2] // k.shape[2]
    if group > 1:  # torch 2.11 has no grouped heads here
        k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    bounds, longest = mask
    mixed = varlen_attn(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), bounds, bounds, longest, longest, window_size=(-1, 0)
    )
    assert isinstance(mixed, Tensor)
    return mixed.view(q.shape)
