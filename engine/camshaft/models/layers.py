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
from torch import Tensor, nn

from camshaft.models.config import ModelConfig
from camshaft.ops import Ops, Rope


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

    def __init__(self, width: int, *, eps: float, ops: Ops | None = None) -> None:
        super().__init__(width, eps=eps)
        self.ops = ops or Ops()

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> Any:
        """Normalise the last dimension; any shape. With ``residual``: (the norm of the sum of both, the sum)."""
        assert self.eps is not None
        if residual is None:
            return self.ops.rms_norm(hidden, self.weight, self.eps)
        return self.ops.add_rms_norm(hidden, residual, self.weight, self.eps)


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


class Attention(nn.Module):
    """Causal attention with grouped queries (Ainslie et al. 2023)."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        std, bias, hidden = config.initializer_range, config.attention_bias, config.hidden_size
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.head_dim = config.head_dim
        self.q_proj = Linear(hidden, queries, std, bias=bias)
        self.k_proj = Linear(hidden, keys, std, bias=bias)
        self.v_proj = Linear(hidden, keys, std, bias=bias)
        self.o_proj = Linear(queries, hidden, config.residual_std)
        self.q_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps, ops=ops) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps, ops=ops) if config.qk_norm else None

    def forward(self, hidden: Tensor, rope: Rope, mask: Any) -> Tensor:
        """``mask`` is None for plain causal attention, else what ``ops.document_mask`` made of the documents."""
        split = (-1, self.head_dim)
        q = self.q_proj(hidden).unflatten(-1, split)
        k = self.k_proj(hidden).unflatten(-1, split)
        v = self.v_proj(hidden).unflatten(-1, split)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.ops.rope(q, k, rope, v.dtype)
        mixed = self.ops.attention(q, k, v) if mask is None else self.ops.document_attention(q, k, v, mask)
        out: Tensor = self.o_proj(mixed.flatten(2))
        return out


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        std, hidden, inner = config.initializer_range, config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(hidden, inner, std)
        self.up_proj = Linear(hidden, inner, std)
        self.down_proj = Linear(inner, hidden, config.residual_std)

    def forward(self, hidden: Tensor) -> Tensor:
        """Each token on its own."""
        out: Tensor = self.down_proj(self.ops.swiglu(self.gate_proj(hidden), self.up_proj(hidden)))
        return out


class Block(nn.Module):
    """One layer: attention and MLP, each normalised first and added to the residual stream."""

    def __init__(self, config: ModelConfig, ops: Ops | None = None) -> None:
        super().__init__()
        ops = ops or Ops()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, ops=ops)
        self.self_attn = Attention(config, ops)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, ops=ops)
        self.mlp = MLP(config, ops)

    def forward(self, hidden: Tensor, rope: Rope, mask: Any) -> Tensor:
        """``rope`` and ``mask`` are made once a forward and shared by all layers."""
        attended = self.self_attn(self.input_layernorm(hidden), rope, mask)
        normed, hidden = self.post_attention_layernorm(attended, hidden)
        out: Tensor = hidden + self.mlp(normed)
        return out
