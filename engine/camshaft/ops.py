"""Operations that have more than one implementation: what the models and the optimizers call, and what offers others.

``Ops`` holds one callable for each operation, torch's own form at first. Every model that is built with
``Llama(config, world.ops)`` (or takes ``world.ops`` in a ``build_model`` of its own) calls them through the table, so
whoever changes an entry in ``rewrite``, before any module exists, changes it everywhere. Implementations are offered as
``Kernel`` in the hook ``kernels``.

Shapes: b rows of s tokens, n query heads, m key/value heads of width d, h features. All results have the shapes and
dtypes of the torch form, and gradients for everything that the torch form has gradients for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from camshaft.state import World

Rope = tuple[Tensor, Tensor]
"""cos and signed sin of the angles of every token, each [b, s, 1, d], fp32 or wider."""

IGNORED = -100
"""Label of a token that is not counted."""

MASKED_GROUPS = frozenset({"cpu"})
"""Device types whose attention takes grouped heads together with a mask. On CUDA only the kernel that stores all
scores does (documentation of ``scaled_dot_product_attention``), so there the key and value heads are repeated."""


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Zhang and Sennrich 2019: [..., h] normalised and times ``weight`` [h], in the wider of both dtypes.

    The mean square is taken in fp32 or wider.
    """
    if hidden.dtype != weight.dtype:
        wide = torch.promote_types(hidden.dtype, weight.dtype)
        hidden, weight = hidden.to(wide), weight.to(wide)
    return F.rms_norm(hidden, weight.shape, weight, eps)


def add_rms_norm(hidden: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(``rms_norm`` of the sum, the sum) of ``residual + hidden``, both [..., h]."""
    summed = residual + hidden
    return rms_norm(summed, weight, eps), summed


def layer_norm(hidden: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Ba et al. 2016, over the last dimension, in the wider dtype of input and weight."""
    if hidden.dtype != weight.dtype:
        wide = torch.promote_types(hidden.dtype, weight.dtype)
        hidden, weight, bias = hidden.to(wide), weight.to(wide), None if bias is None else bias.to(wide)
    return F.layer_norm(hidden, weight.shape, weight, bias, eps)


def rotate(heads: Tensor, rope: Rope, dtype: torch.dtype) -> Tensor:
    """Turn each pair (i, i + d / 2) of ``heads`` [b, s, n, d] by its token's angle; in ``dtype``."""
    cos, sin = rope
    swapped = heads.roll(heads.shape[-1] // 2, -1)
    return torch.addcmul(heads * cos, swapped, sin).to(dtype)


def rope(q: Tensor, k: Tensor, angles: Rope, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Su et al. 2021 (RoFormer) on q [b, s, n, d] and k [b, s, m, d] at once, both returned in ``dtype``."""
    return rotate(q, angles, dtype), rotate(k, angles, dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Shazeer 2020: silu(gate) * up, both [..., h]."""
    return F.silu(gate) * up


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention with grouped queries (Ainslie et al. 2023): q [b, s, n, d], k, v [b, s, m, d] to q's shape."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] > k.shape[1])
    return mixed.transpose(1, 2)


def document_mask(document: Tensor) -> Tensor:
    """Bool [b, 1, s, s]: row i may look at column j if j is not later and in the same document; ``document`` [b, s]."""
    return (document.unsqueeze(-1) == document.unsqueeze(-2)).tril().unsqueeze(1)


def document_attention(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    """Causal attention inside of documents: as ``attention``, with what ``document_mask`` made of the documents."""
    group = q.shape[2] // k.shape[2]
    if group > 1 and v.device.type not in MASKED_GROUPS:
        k, v, group = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2), 1
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=group > 1).transpose(1, 2)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the tokens' cross-entropies, a scalar in fp32 or wider. Exactly 0 where no token is counted.

    ``logits`` [b, s, vocabulary], ``labels`` int64 [b, s] with -100 for tokens that are not counted.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum")


LinearCrossEntropy = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden [b, s, h], weight [vocabulary, h], labels [b, s]) to the sum of cross-entropies of ``hidden @ weight.T``."""


@dataclass
class Ops:
    """One implementation for each operation. Entries are changed in ``rewrite`` alone."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] = add_rms_norm
    layer_norm: Callable[[Tensor, Tensor, Tensor | None, float], Tensor] = layer_norm
    rope: Callable[[Tensor, Tensor, Rope, torch.dtype], tuple[Tensor, Tensor]] = rope
    swiglu: Callable[[Tensor, Tensor], Tensor] = swiglu
    attention: Callable[[Tensor, Tensor, Tensor], Tensor] = attention
    document_mask: Callable[[Tensor], Any] = document_mask
    """Makes what ``document_attention`` takes, once a forward: the two belong together."""
    document_attention: Callable[[Tensor, Tensor, Tensor, Any], Tensor] = document_attention
    cross_entropy: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    linear_cross_entropy: LinearCrossEntropy | None = None
    """Projection and loss in one, without the logits; None: the projection, then ``cross_entropy``."""
    grad_norm: Callable[[list[Tensor]], Tensor] | None = None
    """L2 norm over all tensors of one dtype and device, an fp32 (or wider) scalar. None: torch's own."""
    grouped_matmul: Callable[..., Tensor] | None = None
    updates: dict[str, Callable[..., None]] = field(default_factory=dict)
    """Optimizer steps in place over lists of tensors, by the optimizer's name: ``(parameters, gradients, first
    moments, second moments, step, *, lr, betas, eps, weight_decay, scale)``. ``step`` counts from 1; ``scale`` is a
    scalar tensor that gradients are multiplied by on the way, or None. Without an entry an optimizer has its own."""
    others: dict[str, Any] = field(default_factory=dict)
    """Operations of third parties, by name, for their own models and plugins. Without an entry they have their own."""

    def replace(self, entries: Mapping[str, Any]) -> None:
        """Take entries by their names; ``updates.<name>`` and ``others.<name>`` are of those dictionaries."""
        for name, value in entries.items():
            head, _, tail = name.partition(".")
            if head not in self.__dataclass_fields__ or (head in ("updates", "others")) != bool(tail):
                raise ValueError(f"there is no operation '{name}'")
            if tail:
                getattr(self, head)[tail] = value
            else:
                setattr(self, head, value)


@dataclass(frozen=True)
class Kernel:
    """One implementation of one operation, as the hook ``kernels`` offers it."""

    op: str
    """Name of an entry of ``Ops`` or of its ``updates``; ``add_rms_norm`` and ``document_mask`` come with ``rms_norm``
    and ``document_attention``. Any other name is of a third party's own operation, an entry of ``others``."""
    provider: str
    """What a recipe calls it by."""
    entries: Callable[[], dict[str, Any]]
    """Imports what is needed and returns what ``Ops.replace`` takes."""
    missing: Callable[[World], str | None] = lambda world: None
    """Why it cannot be used in this world (device, dtype, package, sizes), in one sentence; None: it can."""
