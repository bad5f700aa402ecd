"""Exchanges as custom operations, so that a compiled block with its exchanges is one graph.

A compiler cannot look into messages; of a custom operation it needs the result's shape alone. ``line.py`` comes here
while something traces it, and makes the same calls on the same channel as otherwise. A result may not be its input, so
a sum over ranks costs one copy more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

if TYPE_CHECKING:
    from camshaft_tensor_parallel.line import Line

_lines: WeakValueDictionary[int, Line] = WeakValueDictionary()
_BACK = {"gather": "scatter", "scatter": "gather"}


def register(line: Line) -> int:
    """A number by which operations find ``line``, as long as it lives."""
    number = max(_lines, default=-1) + 1
    _lines[number] = line
    return number


@torch.library.custom_op("camshaft_tensor_parallel::exchange", mutates_args=())
def exchange(source: Tensor, number: int, kind: str, hook: str) -> Tensor:
    """``sum`` over ranks, ``gather`` all tokens, or ``scatter`` the sum: as the methods of ``Line`` do."""
    line = _lines[number]
    if kind == "sum":
        return line.all_reduce(source.clone(memory_format=torch.contiguous_format), hook)
    return (line.gather if kind == "gather" else line.scatter)(source, hook)


@exchange.register_fake
def _shape(source: Tensor, number: int, kind: str, hook: str) -> Tensor:
    line, width = _lines[number], source.shape[-1]
    if kind == "sum":
        return torch.empty_like(source, memory_format=torch.contiguous_format)
    if kind == "gather":
        return source.new_empty(line.rows, line.length, width)
    return source.new_empty(1, line.share, width)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.number, ctx.kind, _ = inputs


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.kind != "sum":
        gradient = exchange(gradient, ctx.number, _BACK[ctx.kind], "backward")
    return gradient, None, None, None


exchange.register_autograd(_backward, setup_context=_setup)


class _Enter(torch.autograd.Function):
    """Whole hidden states, unchanged; their gradient is summed over ranks."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, number: int) -> Tensor:
        """``hidden`` of any shape."""
        ctx.number = number
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Sum over ranks."""
        return exchange(gradient, ctx.number, "sum", "backward"), None


def enter(hidden: Tensor, number: int, *, gather: bool) -> Tensor:
    """As ``Line.enter``."""
    if gather:
        whole: Tensor = exchange(hidden, number, "gather", "forward")
    else:
        whole = _Enter.apply(hidden, number)  # type: ignore[no-untyped-call]
    return whole


def leave(partial: Tensor, number: int, *, scatter: bool) -> Tensor:
    """As ``Line.leave``."""
    summed: Tensor = exchange(partial, number, "scatter" if scatter else "sum", "forward")
    return summed
