"""Clipping by global norm as Pascanu et al. (arXiv:1211.5063) write it, for proofs; shares nothing with the plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from camshaft_clip import Options


def coefficient(options: Options, norm: float) -> float:
    """What gradients of global norm ``norm`` are multiplied by; 1e-6 guards against 0, as in torch."""
    if options.max_norm is None:
        return 1.0
    return min(1.0, options.max_norm / (norm + 1e-6))
