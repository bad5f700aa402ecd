"""Modules of a plan get forwards that exchange what their style says. Children stay modules that are called, so that
what other plugins put on them (gathering of parameters, deferred products) still runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camshaft_tensor_parallel.line import Line
from camshaft_tensor_parallel.styles import Style
from camshaft_tensor_parallel.vocabulary import Range, cross_entropy, look_up

Forward = Callable[..., Any]


def install(modules: dict[str, tuple[nn.Module, Style]], line: Line) -> list[nn.Module]:
    """Give each module the forward of its style; parameters still have their whole shapes. Returns those changed."""
    heads = [module for module, style in modules.values() if style.kind == "logits"]
    changed = []
    for module, style in modules.values():
        forward = _forward(module, style, line, heads)
        if forward is not None:
            module.forward = forward
            changed.append(module)
    return changed


def uninstall(modules: list[nn.Module]) -> None:
    """Give the modules the forward of their class back."""
    for module in modules:
        module.__dict__.pop("forward", None)


def _forward(module: nn.Module, style: Style, line: Line, heads: list[nn.Module]) -> Forward | None:
    match style.kind:
        case "region" | "logits":
            return _region(module, line)
        case "row":
            return _row(module, line)
        case "embedding":
            return _embedding(module, line)
        case "loss":
            return _loss(line, Range.of(heads[0].out_features, line)) if heads else None
    return None


def _region(module: nn.Module, line: Line) -> Forward:
    inner = module.forward

    def forward(hidden: Tensor, *rest: Any, **named: Any) -> Any:
        return inner(line.enter(hidden), *rest, **named)

    return forward


def _row(module: nn.Module, line: Line) -> Forward:
    if getattr(module, "bias", None) is None:
        inner = module.forward

        def forward(features: Tensor) -> Tensor:
            return line.leave(inner(features))

        return forward

    def biased(features: Tensor) -> Tensor:
        summed = line.leave(F.linear(features, module.weight))
        return summed + module.bias.to(summed.dtype)

    return biased


def _embedding(module: nn.Module, line: Line) -> Forward:
    own = Range.of(module.num_embeddings, line)

    def forward(tokens: Tensor) -> Tensor:
        line.see(tokens)
        return look_up(tokens, module.weight, own, line, module.padding_idx)

    return forward


def _loss(line: Line, own: Range) -> Forward:
    def forward(logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits, labels, own, line)

    return forward


@torch.no_grad()
def narrow_parameter(parameter: nn.Parameter, shape: tuple[int, ...]) -> None:
    """Let a parameter on meta have ``shape``. It stays the same object, and so do ties and what was set on it."""
    if tuple(parameter.shape) != shape:
        parameter.data = torch.empty(shape, dtype=parameter.dtype, device=parameter.device)
