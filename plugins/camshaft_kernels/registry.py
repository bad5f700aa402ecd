"""The operations that can be chosen, and what the built-in decoder does with them. Importing this imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Place = Literal["layers", "loss", "optimizer", "clip", "nowhere"]
"""Where the built-in decoder, or what trains it, calls an operation."""


@dataclass(frozen=True, slots=True)
class Op:
    """One operation. ``entries``: of ``camshaft.ops.Ops``, which belong together."""

    entries: tuple[str, ...]
    place: Place


OPS: dict[str, Op] = {
    "rms_norm": Op(("rms_norm", "add_rms_norm"), "layers"),
    "layer_norm": Op(("layer_norm",), "nowhere"),
    "rope": Op(("rope",), "layers"),
    "swiglu": Op(("swiglu",), "layers"),
    "linear_cross_entropy": Op(("linear_cross_entropy",), "loss"),
    "cross_entropy": Op(("cross_entropy",), "loss"),
    "attention": Op(("attention",), "layers"),
    "document_attention": Op(("document_mask", "document_attention"), "layers"),
    "adamw": Op(("updates.adamw",), "optimizer"),
    "lamb": Op(("updates.lamb",), "optimizer"),
    "grad_norm": Op(("grad_norm",), "clip"),
    "grouped_matmul": Op(("grouped_matmul",), "nowhere"),
}

AUTO = "auto"
TORCH = "torch"
"""The provider that is always there."""
UNFUSED = "unfused"
"""The provider of ``linear_cross_entropy`` that leaves the model's projection and its loss two operations."""
PROVIDERS = (TORCH, "triton", "apex", "liger", "transformer_engine", "flash_attention", UNFUSED)
"""Providers that this plugin knows by itself. ``torch`` and ``unfused`` need nothing."""
PACKAGES = {
    "triton": "triton",
    "liger_kernel": "liger-kernel",
    "transformer_engine": "transformer-engine",
    "flash_attn": "flash-attn",
}
"""Module to distribution of the packages that providers need, beside apex, which is told apart by what is in it."""

COMPILER = "compile"
"""The plugin under which modules are traced."""


def own_form(op: str) -> str:
    """The provider that changes nothing."""
    return UNFUSED if op == "linear_cross_entropy" else TORCH
