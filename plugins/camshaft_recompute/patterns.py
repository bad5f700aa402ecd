"""Names of a recipe: kinds of operations, and modules. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

KINDS: dict[str, tuple[str, ...]] = {
    "products": (
        "aten.mm", "aten.addmm", "aten._scaled_mm", "aten._scaled_mm_v2", "aten._grouped_mm",
        "aten._scaled_grouped_mm*", "aten._addmm_activation", "aten.convolution", "aten._weight_int*_mm",
    ),
    "batched_products": ("aten.bmm", "aten.baddbmm"),
    "attention": (
        "aten._scaled_dot_product_*attention*", "aten._flash_attention_forward", "aten._efficient_attention_forward",
        "aten._cudnn_attention_forward", "flash_attn*", "torch_attn*",
    ),
    "softmax": ("aten._softmax", "aten._safe_softmax", "aten._log_softmax"),
    "activations": (
        "aten.silu", "aten.gelu", "aten.relu", "aten.sigmoid", "aten.tanh", "aten.leaky_relu", "aten.elu", "aten.mish",
    ),
    "norms": ("aten.native_layer_norm", "aten.native_group_norm", "aten._fused_rms_norm", "aten.rsqrt"),
}  # fmt: skip
"""Kinds that ``save`` takes: patterns of operations. Batched products are those of attention that is written out."""

Levels = tuple[str, ...]


def matches(name: str, pattern: str) -> bool:
    """Whether a module's name fits, ``*`` within one level."""
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def number(name: str) -> int | None:
    """The layer that a module is or is in: the first number in its name."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def wanted(name: str, every: int | None, layers: Sequence[int] | None) -> bool:
    """Whether the layer of module ``name`` is one of those asked for; modules without a number are where none is."""
    if every is None and layers is None:
        return True
    layer = number(name)
    if layer is None:
        return False
    return (every is None or layer % every == 0) and (layers is None or layer in layers)


def chosen(
    names: Iterable[str], patterns: Sequence[str], every: int | None = None, layers: Sequence[int] | None = None
) -> list[str]:
    """Modules among ``names`` that are asked for, in their order; what is inside of a chosen one is part of it."""
    fitting = dict.fromkeys(
        name for name in names if any(matches(name, pattern) for pattern in patterns) and wanted(name, every, layers)
    )
    return [name for name in fitting if not any(outer in fitting for outer in _around(name))]


def _around(name: str) -> Iterator[str]:
    """Names of the modules that ``name`` is inside of."""
    parts = name.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts)))


def inside(name: str, outer: str) -> bool:
    """Whether module ``name`` is ``outer`` or in it."""
    return name == outer or name.startswith(f"{outer}.")
