"""Bugs of norms, clipping and scaling."""

from __future__ import annotations

import torch

from camshaft import Plugin, hookimpl
from camshaft_clip import Plugin as Clip
from camshaft_clip.norm import Clipper
from camshaft_zero import Plugin as Zero


class _Clips(Clip):
    """Owns ``clip``; ``made`` is the clipper."""

    made: type[Clipper]
    _clipper = None

    @hookimpl
    def clip(self, state):
        world = state.world
        if self._clipper is None:
            self._clipper = self.made(
                world.parts, self.options.max_norm, master=world.policy.master, device=world.device
            )
        return self._clipper()


class _Replicated(Clipper):
    def _by_copies(self):
        return {1: [tensor for members in super()._by_copies().values() for tensor in members]}


class ReplicatedTwice(_Clips):
    """What several ranks hold alike is counted once for each of them."""

    made = _Replicated


class _Tied(Clipper):
    def norm(self):
        tied = [
            part.tensor.grad
            for part in self.parts
            if part.tensor.grad is not None and any("embed_tokens" in piece.name for piece in part.pieces)
        ]
        return (super().norm() ** 2 + sum(grad.norm() ** 2 for grad in tied)).sqrt()


class TiedTwice(_Clips):
    """A tied matrix is counted under both of its names."""

    made = _Tied


class PaddingInNorm(Zero):
    """What fills shards up to equal sizes is not zero in the gradient."""

    @hookimpl
    def post_reduce(self, state) -> None:
        for part in state.world.parts:
            if part.tensor.grad is None:
                continue
            padding = torch.ones(part.tensor.numel(), dtype=torch.bool)
            for piece in part.pieces:
                padding[piece.place : piece.place + piece.length] = False
            part.tensor.grad.view(-1)[padding] = 0.5


class ClipsScaled(Plugin):
    """Scales the loss, and divides the scale out of the gradients after they were clipped."""

    SCALE = 1024.0

    @hookimpl
    def bind(self, state) -> None:
        state.loss_scale = torch.tensor(self.SCALE)

    @hookimpl
    def around_step(self, state, call):
        def step() -> None:
            for tensor in state.world.parts.tensors:
                if tensor.grad is not None:
                    tensor.grad.div_(self.SCALE)
            call()

        return step
