"""Products that run while tokens travel: the gather before a region's first products and the scatter after its last one
go in one message to each rank, and each stretch of tokens is multiplied as soon as it is there, or sent as soon as it
is (Wang et al., ASPLOS 2023, "Overlap Communication with Dependent Computation via Decomposition").

Rank r exchanges with r + 1 and r - 1 first, then with r + 2 and r - 2, so that every rank meets one other at a time.
Bytes are those of a gather and a scatter. Products of fewer rows at a time are the price.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from camshaft.comm import Pending
from camshaft_tensor_parallel.line import Line

Weights = Sequence[Tensor | None]
"""Weight and bias (or None) of each product in turn."""


def divides(line: Line) -> bool:
    """Whether every rank has equally many tokens of the batch, without padding."""
    return line.share * line.size == line.rows * line.length


def enter(shard: Tensor, line: Line, weights: Weights) -> tuple[Tensor, ...]:
    """``shard`` [1, m, h] of all ranks as [b, s, h], and its products with ``weights`` [o, h], each [b, s, o]."""
    made: tuple[Tensor, ...] = _Enter.apply(shard, line, *weights)  # type: ignore[no-untyped-call]
    return made


def leave(features: Tensor, weight: Tensor, line: Line) -> Tensor:
    """This rank's tokens [1, m, h] of the sum over ranks of ``features`` [b, s, f] times ``weight`` [h, f]."""
    made: Tensor = _Leave.apply(features, weight, line)  # type: ignore[no-untyped-call]
    return made


def _peers(line: Line) -> Iterator[tuple[int, int]]:
    """(whom this rank sends to, whom it receives from) in each step."""
    for step in range(1, line.size):
        yield (line.rank + step) % line.size, (line.rank - step) % line.size


def _message(line: Line, hook: str, ends: tuple[int, int], source: Tensor, output: Tensor) -> Pending:
    nothing = source.new_empty(0)
    sources, outputs = [nothing] * line.size, [nothing] * line.size
    sources[ends[0]], outputs[ends[1]] = source, output
    return line.channel.all_to_all(outputs, sources, hook)


def _gathered(shard: Tensor, whole: Sequence[Tensor], line: Line, hook: str) -> Iterator[int]:
    """Fill ``whole``, a stretch for each rank, and tell of each one when it is there; this rank's own comes first."""
    waiting = [(ends[1], _message(line, hook, ends, shard, whole[ends[1]])) for ends in _peers(line)]
    whole[line.rank].copy_(shard)
    yield line.rank
    for peer, pending in waiting:
        pending.wait()
        yield peer


class _Sum:
    """The sum over ranks of stretches that are sent as they are made; ranks are added in ascending order."""

    def __init__(self, line: Line, hook: str) -> None:
        self._line, self._hook = line, hook
        self._pending: list[Pending] = []
        self._parts: list[Tensor | None] = [None] * line.size

    def add(self, stretches: Iterable[tuple[tuple[int, int] | None, Tensor]]) -> None:
        """Send each stretch to whom it is for; None: it is this rank's own."""
        for ends, stretch in stretches:
            if ends is None:
                self._parts[self._line.rank] = stretch
                continue
            received = self._parts[ends[1]] = torch.empty_like(stretch)
            self._pending.append(_message(self._line, self._hook, ends, stretch, received))

    def result(self) -> Tensor:
        """Wait, and add in fp32 or wider."""
        for pending in self._pending:
            pending.wait()
        parts = [part for part in self._parts if part is not None]
        total = parts[0].to(torch.promote_types(parts[0].dtype, torch.float32), copy=True)
        for part in parts[1:]:
            total += part
        return total.to(parts[0].dtype)


def _stretches(tensor: Tensor, line: Line) -> Sequence[Tensor]:
    return tensor.view(line.size, line.share, tensor.shape[-1]).unbind()


def _ends(line: Line) -> Iterator[tuple[tuple[int, int] | None, int]]:
    """Each step's ends and the stretch to make for it; this rank's own is made last, while the others travel."""
    for ends in _peers(line):
        yield ends, ends[0]
    yield None, line.rank


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: Tensor, line: Line, *weights: Tensor | None) -> tuple[Tensor, ...]:
        flat = shard.new_empty(line.size * line.share, shard.shape[-1])
        rows = _stretches(flat, line)
        pairs = [(weight.to(flat.dtype).t(), bias) for weight, bias in _pairs(weights)]
        outputs = [flat.new_empty(len(flat), weight.shape[1]) for weight, _ in pairs]
        parts = [_stretches(output, line) for output in outputs]
        for peer in _gathered(shard.reshape(line.share, -1), rows, line, "forward"):
            for (weight, _), part in zip(pairs, parts, strict=True):
                torch.mm(rows[peer], weight, out=part[peer])
        for output, (_, bias) in zip(outputs, pairs, strict=True):
            if bias is not None:
                output += bias
        ctx.line, ctx.shape = line, shard.shape
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(flat, *weights)
        return tuple(each.view(line.rows, line.length, -1) for each in (flat, *outputs))

    @staticmethod
    def backward(ctx: Any, whole: Tensor | None, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        line, (flat, *weights) = ctx.line, ctx.saved_tensors
        made = [None if each is None else each.reshape(-1, each.shape[-1]).contiguous() for each in gradients]
        pairs = list(zip(made, _pairs(weights), strict=True))
        total = None
        if ctx.needs_input_grad[0]:
            sources = [
                (_stretches(each, line), weight.to(each.dtype)) for each, (weight, _) in pairs if each is not None
            ]
            direct = None if whole is None else _stretches(whole.reshape(-1, whole.shape[-1]), line)
            total = _Sum(line, "backward")
            total.add((ends, _towards(place, sources, direct)) for ends, place in _ends(line))
        found: list[Tensor | None] = []
        for number, (each, (weight, bias)) in enumerate(pairs):
            needs_weight, needs_bias = ctx.needs_input_grad[2 + 2 * number : 4 + 2 * number]
            found.append(each.t().mm(flat).to(weight.dtype) if each is not None and needs_weight else None)
            found.append(each.sum(0).to(bias.dtype) if each is not None and bias is not None and needs_bias else None)
        return (None if total is None else total.result().view(ctx.shape)), None, *found


def _pairs(weights: Weights) -> list[tuple[Any, Tensor | None]]:
    return list(zip(weights[::2], weights[1::2], strict=True))


def _towards(place: int, sources: Sequence[tuple[Sequence[Tensor], Tensor]], direct: Sequence[Tensor] | None) -> Tensor:
    """Gradient of the gathered input on the tokens of rank ``place``, of this rank's products alone."""
    total = None if direct is None else direct[place].clone()
    for stretches, weight in sources:
        total = stretches[place].mm(weight) if total is None else total.addmm_(stretches[place], weight)
    assert total is not None, "backward runs where some output has a gradient"
    return total


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, line: Line) -> Tensor:
        flat = features.reshape(-1, features.shape[-1]).contiguous()
        rows, turned = _stretches(flat, line), weight.to(flat.dtype).t()
        total = _Sum(line, "forward")
        total.add((ends, rows[place].mm(turned)) for ends, place in _ends(line))
        ctx.line, ctx.shape = line, features.shape
        ctx.save_for_backward(flat, weight)
        return total.result().unsqueeze(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        line, (flat, weight) = ctx.line, ctx.saved_tensors
        whole = gradient.new_empty(len(flat), gradient.shape[-1])
        towards, narrow = torch.empty_like(flat, dtype=gradient.dtype), weight.to(gradient.dtype)
        rows, parts = _stretches(whole, line), _stretches(towards, line)
        for peer in _gathered(gradient.reshape(line.share, -1).contiguous(), rows, line, "backward"):
            torch.mm(rows[peer], narrow, out=parts[peer])
        product = whole.t().mm(flat).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return towards.view(ctx.shape), product, None
