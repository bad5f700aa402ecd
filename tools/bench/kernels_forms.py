"""What takes part in the benchmark of kernels: for each operation, who offers it, made when it is its turn."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from camshaft import ops

Forms = dict[str, Callable[[], Callable[..., Any]]]
"""By contestant: what imports or compiles it, and gives the function that is timed."""

OURS, EAGER, COMPILED, LIGER = "Camshaft", "torch", "torch.compile", "Liger"
FUSED, FOREACH = "torch fused", "torch foreach"
NAMES = (OURS, EAGER, COMPILED, LIGER, FUSED, FOREACH)
EPS = 1e-6
UPDATE = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def versions() -> dict[str, str]:
    """Of the packages that kernels come from, where they are."""
    found = {}
    for name in ("triton", "liger-kernel"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _with_torch(form: Callable[..., Any]) -> Forms:
    """torch's form as it is, and compiled for these very sizes."""

    def compiled() -> Callable[..., Any]:
        torch.compiler.reset()
        function: Callable[..., Any] = torch.compile(form, fullgraph=True, dynamic=False)
        return function

    return {EAGER: lambda: form, COMPILED: compiled}


def rms_norm() -> Forms:
    """(hidden, weight). Liger's backward writes over what comes to the output, as by default; else it clears memory."""

    def ours() -> Callable[..., Any]:
        from camshaft_kernels.triton.norm import rms_norm

        return lambda hidden, weight: rms_norm(hidden, weight, EPS)

    def liger() -> Callable[..., Any]:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        return lambda hidden, weight: LigerRMSNormFunction.apply(hidden, weight, EPS, 0.0, "llama", True)

    return {OURS: ours, **_with_torch(lambda hidden, weight: ops.rms_norm(hidden, weight, EPS)), LIGER: liger}


def add_rms_norm() -> Forms:
    """(hidden, residual, weight)."""

    def ours() -> Callable[..., Any]:
        from camshaft_kernels.triton.norm import add_rms_norm

        return lambda hidden, residual, weight: add_rms_norm(hidden, residual, weight, EPS)

    def torchs(hidden: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return ops.add_rms_norm(hidden, residual, weight, EPS)

    def liger() -> Callable[..., Any]:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

        return lambda *terms: LigerFusedAddRMSNormFunction.apply(*terms, EPS)

    return {OURS: ours, **_with_torch(torchs), LIGER: liger}


def rope() -> Forms:
    """(q, k, angles, dtype). Liger's writes over its inputs, which here nobody needs again."""

    def ours() -> Callable[..., Any]:
        from camshaft_kernels.triton.rope import rope

        return rope

    def liger() -> Callable[..., Any]:
        from liger_kernel.ops.rope import LigerRopeFunction

        def turned(q: Tensor, k: Tensor, angles: ops.Rope, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            half = q.shape[-1] // 2
            sin = angles[1].squeeze(2).roll(half, -1)  # the first half without its sign, which is all that it reads
            one, other = LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), angles[0].squeeze(2), sin)[:2]
            return one.transpose(1, 2), other.transpose(1, 2)

        return turned

    return {OURS: ours, **_with_torch(ops.rope), LIGER: liger}


def swiglu() -> Forms:
    """(gate, up)."""

    def ours() -> Callable[..., Any]:
        from camshaft_kernels.triton.swiglu import swiglu

        return swiglu

    def liger() -> Callable[..., Any]:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return lambda gate, up: LigerSiLUMulFunction.apply(gate, up)

    return {OURS: ours, **_with_torch(ops.swiglu), LIGER: liger}


def cross_entropy() -> Forms:
    """(logits, labels)."""

    def ours() -> Callable[..., Any]:
        from camshaft_kernels.triton.loss import cross_entropy

        return cross_entropy

    def liger() -> Callable[..., Any]:
        from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

        def loss(logits: Tensor, labels: Tensor) -> Any:
            flat = logits.flatten(0, -2), labels.flatten()
            return LigerCrossEntropyFunction.apply(*flat, None, ops.IGNORED, 0.0, 0.0, "sum")[0]

        return loss

    return {OURS: ours, **_with_torch(ops.cross_entropy), LIGER: liger}


def linear_cross_entropy() -> Forms:
    """(hidden, weight, labels)."""

    def ours() -> Callable[..., Any]:
        from camshaft_kernels.triton.head import linear_cross_entropy

        return linear_cross_entropy

    def apart(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return ops.cross_entropy(F.linear(hidden, weight), labels)

    def liger() -> Callable[..., Any]:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Fused

        def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Any:
            flat = hidden.flatten(0, -2), weight, labels.flatten()
            return Fused.apply(*flat, None, None, ops.IGNORED, 0.0, 0.0, "sum")[0]

        return loss

    return {OURS: ours, **_with_torch(apart), LIGER: liger}


def adamw() -> Forms:
    """(parameters, gradients, first, second), with clipping's factor: ours takes it along, torch multiplies before."""

    def ours() -> Callable[..., Any]:
        from camshaft_kernels.triton.adamw import adamw

        factors: dict[torch.device, Tensor] = {}

        def step(parameters: list[Tensor], gradients: list[Tensor], first: list[Tensor], second: list[Tensor]) -> None:
            device = parameters[0].device
            scale = factors.setdefault(device, torch.ones((), device=device))
            adamw(parameters, gradients, first, second, 10, scale=scale, **UPDATE)  # type: ignore[arg-type]

        return step

    fused, foreach = (partial(_torch_step, **{kind: True}) for kind in ("fused", "foreach"))
    return {OURS: ours, FUSED: fused, FOREACH: foreach}


def _torch_step(**kind: bool) -> Callable[..., Any]:
    made: dict[int, torch.optim.AdamW] = {}

    def step(parameters: list[Tensor], gradients: list[Tensor], *moments: list[Tensor]) -> None:
        optimizer = made.get(id(parameters))
        if optimizer is None:
            optimizer = made[id(parameters)] = torch.optim.AdamW(parameters, **UPDATE, **kind)  # type: ignore[arg-type]
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
        torch._foreach_mul_(gradients, torch.ones((), device=gradients[0].device))
        optimizer.step()

    return step
