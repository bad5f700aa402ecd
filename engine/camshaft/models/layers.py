"""The parts of a Llama-family decoder, with Hugging Face's names and layouts.

Shapes: b rows of s tokens, ``hidden`` [b, s, hidden_size]. Matrix products run in the dtype of their inputs or in
autocast's; norms and rotations in fp32 or wider. Nothing here knows of a layout: head counts are read from the
tensors, so that a module whose projections were divided along their heads still works.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camshaft.models.config import ModelConfig

Rope = tuple[Tensor, Tensor]
"""cos and signed sin of the angles of every token, each [b, s, 1, head_dim], fp32 or wider."""

MASKED_GROUPS = frozenset({"cpu"})
"""Device types whose attention takes grouped heads together with a mask. On CUDA only the kernel that stores all
scores does (documentation of ``scaled_dot_product_attention``), so there the key and value heads are repeated."""


class Linear(nn.Linear):
    """A projection that knows the standard deviation of its first values."""

    def __init__(self, inputs: int, outputs: int, std: float, *, bias: bool = False) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.initializer_std = std


class Embedding(nn.Embedding):
    """A table that knows the standard deviation of its first values."""

    def __init__(self, rows: int, width: int, std: float) -> None:
        super().__init__(rows, width)
        self.initializer_std = std


class RMSNorm(nn.RMSNorm):
    """Zhang and Sennrich 2019. torch computes the mean square in fp32 or wider; mixed dtypes are promoted first."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise the last dimension; any shape."""
        weight: Tensor = self.weight
        if hidden.dtype != weight.dtype:
            wide = torch.promote_types(hidden.dtype, weight.dtype)
            hidden, weight = hidden.to(wide), weight.to(wide)
        return F.rms_norm(hidden, self.normalized_shape, weight, self.eps)


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Radians a position for each pair of a head, fp64 [head_dim / 2] on the CPU.

    Su et al. 2021 (RoFormer), with the scaling of Llama 3.1 where the configuration has it.
    """
    steps = torch.arange(0, config.head_dim, 2, dtype=torch.float64, device="cpu")
    frequencies = config.rope_theta ** (-steps / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return frequencies * (kept + (1 - kept) / scaling.factor)


class RotaryEmbedding(nn.Module):
    """Angles of rotary position embeddings.

    The frequencies are a buffer that no state dict holds and no cast touches: it stays fp64, because at position
    100,000 an fp32 angle is off by up to 0.004 radians, and a bf16 frequency by hundreds.
    """

    inv_freq: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("inv_freq", None, persistent=False)
        self.reset_buffers(torch.get_default_device())

    def reset_buffers(self, device: torch.device) -> None:
        """Compute the buffer anew on ``device``."""
        self.inv_freq = inverse_frequencies(self.config).to(device)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        # .to(), .bfloat16() and .to_empty() all come through here; only the device may change.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.reset_buffers(self.inv_freq.device)
        return self

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Rope:
        """``positions`` int64 [b, s], counted from each document's start; tables are returned in ``dtype``."""
        angles = positions.unsqueeze(-1) * self.inv_freq
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        return torch.cat((cos, cos), -1).unsqueeze(2), torch.cat((-sin, sin), -1).unsqueeze(2)


def rotate(heads: Tensor, rope: Rope, dtype: torch.dtype) -> Tensor:
    """Turn each pair (i, i + head_dim / 2) of ``heads`` [b, s, n, head_dim] by its token's angle; in ``dtype``."""
    cos, sin = rope
    swapped = heads.roll(heads.shape[-1] // 2, -1)
    return torch.addcmul(heads * cos, swapped, sin).to(dtype)


def document_mask(document: Tensor) -> Tensor:
    """Bool [b, 1, s, s]: row i may look at column j if j is not later and in the same document; ``document`` [b, s]."""
    return (document.unsqueeze(-1) == document.unsqueeze(-2)).tril().unsqueeze(1)


class Attention(nn.Module):
    """Causal attention with grouped queries (Ainslie et al. 2023)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        std, bias, hidden = config.initializer_range, config.attention_bias, config.hidden_size
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.head_dim = config.head_dim
        self.q_proj = Linear(hidden, queries, std, bias=bias)
        self.k_proj = Linear(hidden, keys, std, bias=bias)
        self.v_proj = Linear(hidden, keys, std, bias=bias)
        self.o_proj = Linear(queries, hidden, config.residual_std)
        self.q_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None

    def forward(self, hidden: Tensor, rope: Rope, mask: Tensor | None) -> Tensor:
        """``mask`` is None for plain causal attention, else bool [b, 1, s, s] with True where a token may look."""
        split = (-1, self.head_dim)
        q = self.q_proj(hidden).unflatten(-1, split)
        k = self.k_proj(hidden).unflatten(-1, split)
        v = self.v_proj(hidden).unflatten(-1, split)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, rope, v.dtype), rotate(k, rope, v.dtype)
        group = q.shape[2] // k.shape[2]
        grouped = group > 1
        if grouped and mask is not None and v.device.type not in MASKED_GROUPS:
            k, v, grouped = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2), False
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=grouped,
        )
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        std, hidden, inner = config.initializer_range, config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(hidden, inner, std)
        self.up_proj = Linear(hidden, inner, std)
        self.down_proj = Linear(inner, hidden, config.residual_std)

    def forward(self, hidden: Tensor) -> Tensor:
        """Each token on its own."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
        return out


class Block(nn.Module):
    """One layer: attention and MLP, each normalised first and added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, hidden: Tensor, rope: Rope, mask: Tensor | None) -> Tensor:
        """``rope`` and ``mask`` are made once a forward and shared by all layers."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rope, mask)
        out: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return out
