"""What goes into a region and what comes out of it, on every rank: Shoeybi et al. (arXiv:1909.08053), section 3, and
with the sequence divided Korthikanti et al. (arXiv:2205.05198), section 4.2.2.

Between regions hidden states are either whole on every rank, ``[b, s, h]``, or divided over the tokens of all rows
together, ``[1, m, h]`` with m = b s / degree: so a gather is one contiguous tensor, whatever the number of rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from camshaft.comm import Channel
from camshaft_tensor_parallel import traced


class Line:
    """This rank's way to the others, and whether tokens are divided between regions (``sequence``)."""

    def __init__(self, channel: Channel, *, sequence: bool) -> None:
        self.channel, self.sequence = channel, sequence
        self.size, self.rank = channel.size, channel.rank
        self._number = traced.register(self)
        self.rows = self.length = 0
        """Shape of the batch of the forward that runs."""

    def see(self, tokens: Tensor) -> None:
        """Take the batch's shape from ``tokens`` [b, s]."""
        self.rows, self.length = tokens.shape

    @property
    def share(self) -> int:
        """Tokens between regions on a rank; where the batch does not divide, the last ranks' end with padding."""
        return -(-self.rows * self.length // self.size)

    def enter(self, hidden: Tensor) -> Tensor:
        """Whole hidden states for a region; their gradient is summed over ranks. In autocast's dtype where it is on."""
        hidden = narrow(hidden)
        if torch.compiler.is_compiling():
            return traced.enter(hidden, self._number, gather=self.sequence)
        whole: Tensor = (_Gather if self.sequence else _Enter).apply(hidden, self)  # type: ignore[no-untyped-call]
        return whole

    def leave(self, partial: Tensor) -> Tensor:
        """The sum over ranks of ``partial`` [b, s, h], which this may overwrite: whole, or this rank's tokens."""
        if torch.compiler.is_compiling():
            return traced.leave(partial, self._number, scatter=self.sequence)
        summed: Tensor = (_Scatter if self.sequence else _Leave).apply(partial, self)  # type: ignore[no-untyped-call]
        return summed

    def all_reduce(self, tensor: Tensor, hook: str, op: str = "sum") -> Tensor:
        """In place."""
        self.channel.all_reduce(tensor, hook, op).wait()
        return tensor

    def gather(self, shard: Tensor, hook: str) -> Tensor:
        """``shard`` [1, m, h] of every rank as [b, s, h]."""
        width, tokens = shard.shape[-1], self.rows * self.length
        whole = shard.new_empty(self.size * self.share, width)
        self.channel.all_gather(whole, shard.contiguous(), hook).wait()
        return whole[:tokens].view(self.rows, self.length, width)

    def scatter(self, partial: Tensor, hook: str) -> Tensor:
        """This rank's tokens [1, m, h] of the sum over ranks of ``partial`` [b, s, h]."""
        width, missing = partial.shape[-1], self.size * self.share - self.rows * self.length
        flat = partial.reshape(-1, width)
        if missing:
            flat = torch.cat((flat, flat.new_zeros(missing, width)))
        shard = flat.new_empty(1, self.share, width)
        self.channel.reduce_scatter(shard, flat.contiguous(), hook).wait()
        return shard


def narrow(hidden: Tensor) -> Tensor:
    """In the dtype that autocast will give the products: one cast for all of them, and no more bytes than they need."""
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind) or hidden.dtype == torch.float64:
        return hidden
    return hidden.to(torch.get_autocast_dtype(kind))


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, line: Line) -> Tensor:
        ctx.line = line
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        fresh = gradient.clone(memory_format=torch.contiguous_format)  # others may hold the gradient too
        return ctx.line.all_reduce(fresh, "backward"), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, partial: Tensor, line: Line) -> Tensor:
        ctx.mark_dirty(partial)
        return line.all_reduce(partial, "forward")

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: Tensor, line: Line) -> Tensor:
        ctx.line = line
        return line.gather(shard, "forward")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.line.scatter(gradient, "backward"), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, line: Line) -> Tensor:
        ctx.line = line
        return line.scatter(partial, "forward")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.line.gather(gradient, "backward"), None
