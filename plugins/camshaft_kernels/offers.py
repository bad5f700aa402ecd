"""Every implementation that this plugin knows, as a table: what it is of, and where it can be. Without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from camshaft_kernels import packages
from camshaft_kernels.packages import Lack
from camshaft_kernels.registry import AUTO, OPS, TORCH, UNFUSED

ANYWHERE = frozenset({"cpu", "cuda"})
GPU = frozenset({"cuda"})
EVERY = frozenset({"fp64", "fp32", "bf16", "fp16"})
TO_FP32 = frozenset({"fp32", "bf16", "fp16"})
HALF = frozenset({"bf16", "fp16"})
AMPERE = (8, 0)


@dataclass(frozen=True, slots=True)
class Offer:
    """One implementation. ``source`` is a function of a module of ``camshaft_kernels.providers`` that returns entries
    of ``camshaft.ops.Ops``.
    """

    op: str
    provider: str
    source: str
    devices: frozenset[str] = GPU
    dtypes: frozenset[str] = TO_FP32
    """Of what the operation gets."""
    capability: tuple[int, int] = (0, 0)
    """Oldest GPU."""
    widest_head: int | None = None
    """Largest width of a head."""
    compiles: bool = True
    """Whether ``torch.compile`` can trace it once for all batches."""

    def entries(self) -> dict[str, Any]:
        """Import what is needed and return what ``Ops.replace`` takes."""
        from importlib import import_module

        module, _, name = self.source.partition(":")
        found: dict[str, Any] = getattr(import_module(f"camshaft_kernels.providers.{module}"), name)()
        return found

    def lack(self, device: str) -> Lack | None:
        """What is missing on a device of type ``device``, as far as it can be known without torch."""
        if device not in self.devices and not (self.provider == "triton" and packages.interpreted()):
            name = self.provider
            return f"'{name}' needs a GPU, and this run is on a {device.upper()}", f"name {TORCH} or {AUTO} here"
        return packages.lack(self.provider)


def _own(*ops: str) -> list[Offer]:
    return [Offer(op, TORCH, "torch:own", ANYWHERE, EVERY) for op in ops]


def _of(provider: str, *ops: str, **limits: Any) -> list[Offer]:
    return [Offer(op, provider, f"{provider}:{op}", **limits) for op in ops]


LIST: tuple[Offer, ...] = (
    *_own(*(op for op in OPS if op not in ("linear_cross_entropy", "grouped_matmul"))),
    Offer("linear_cross_entropy", TORCH, "torch:in_chunks", ANYWHERE, EVERY),
    Offer("linear_cross_entropy", UNFUSED, "torch:own", ANYWHERE, EVERY),
    Offer("grouped_matmul", TORCH, "torch:grouped", ANYWHERE, EVERY),
    Offer("document_attention", "torch_segments", "torch:by_segments", ANYWHERE, EVERY, compiles=False),
    Offer(
        "document_attention", "torch_varlen", "torch:varlen", dtypes=HALF, capability=AMPERE, widest_head=256
    ),
    *_of(
        "triton", "rms_norm", "rope", "swiglu", "cross_entropy", "linear_cross_entropy", dtypes=EVERY,
        capability=AMPERE,
    ),
    *_of("triton", "adamw", capability=AMPERE),
    *_of("apex", "rms_norm", "layer_norm", "adamw", "grad_norm"),
    *_of("apex", "lamb", dtypes=frozenset({"fp32", "fp16"})),
    *_of("liger", "rms_norm", "layer_norm", "rope", "swiglu", "cross_entropy", "linear_cross_entropy"),
    *_of("transformer_engine", "cross_entropy"),
    *_of("transformer_engine", "attention", dtypes=HALF, capability=AMPERE, widest_head=256),
    *_of(
        "flash_attention", "attention", "document_attention", dtypes=HALF, capability=AMPERE, widest_head=256
    ),
)  # fmt: skip

OFFERS: Mapping[str, Mapping[str, Offer]] = {
    op: {offer.provider: offer for offer in LIST if offer.op == op} for op in OPS
}
"""Operation to provider to offer."""
