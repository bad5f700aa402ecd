"""Forward and backward of one microbatch, without saying in which order: the core's own F and B are made of these, and
so are those of a plugin that runs a pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from camshaft import bind
from camshaft.data.loader import Batch
from camshaft.host import Host
from camshaft.program import Action, Kind
from camshaft.seeds import Seeds, seed_step
from camshaft.state import State


class Strokes:
    """The hooks around a forward and a backward, and the number that divides the loss.

    The loss is a pair (sum, weight). Only here is it divided: once, by the weight summed over the window and over
    every axis that splits the batch, before the first backward, so that gradients come out final in scale.
    """

    def __init__(self, host: Host, state: State, program: Sequence[Action]) -> None:
        self.state = state
        world = state.world
        self._replicas = world.world_size // world.mesh.shape.batch_degree
        self.call = bind.middleware(host, "around_forward", state, state.model)
        """The model's forward inside of every plugin's ``around_forward``, without ``pre_forward``."""
        self._pre_forward = bind.event(host, "pre_forward")
        self._seeds = Seeds(state)
        self._post_backward = bind.event(host, "post_backward")
        backwards = [action for action in program if action.kind in (Kind.B, Kind.W)]
        self._final = {action.stage: action for action in backwards}  # of each stage the last one stays
        self._last = backwards[-1]
        self._factor: float | None = None
        self.stop_votes = self.total_weight = 0

    def close(self) -> None:
        """Take from the model what was put on it."""
        self._seeds.close()

    def start_window(self, stop_requested: bool) -> None:
        """Begin to sum this window's weight over all ranks; ``state.window`` is set."""
        state = self.state
        assert state.window is not None
        state.control.start((state.window.weight, int(stop_requested)))
        state.loss, self._factor = None, None

    def seed(self) -> None:
        """Seed the window, before anything of it runs."""
        seed_step(self.state)
        self._seeds.start_window()

    def end_window(self) -> None:
        """Every forward and backward has run."""
        self._seeds.end_window()

    def forward(self, action: Action, hidden: Tensor | None = None) -> Tensor:
        """Run ``action``'s microbatch through its stage: the sum of token losses, or what the next stage starts from.

        ``hidden`` is what the stage before made; the model gets it, and the stage, with the batch.
        """
        state = self.state
        assert state.window is not None
        state.microbatch, state.stage = action.microbatch, action.stage
        self._seeds.begin()
        batch: Batch = state.window.batches[action.microbatch]
        if state.world.stages:
            batch = replace(batch, stage=action.stage, hidden=hidden)
        if self._pre_forward is not None:
            self._pre_forward(state, batch)
        made: Tensor = self.call(batch)
        return made

    def begin_backward(self, action: Action) -> None:
        """Say what is worked on: before each B, I and W."""
        state = self.state
        state.microbatch, state.stage = action.microbatch, action.stage
        state.inputs_only = action.kind is Kind.I
        self._seeds.begin_backward()
        state.final_backward = action == self._final.get(action.stage)
        state.last_backward = action == self._last

    def end_backward(self) -> None:
        """Tell every plugin, after each B and each W: the gradients of this microbatch and stage are there."""
        if self._post_backward is not None:
            self._post_backward(self.state)

    def scale(self, loss: Tensor) -> Tensor:
        """The gradient that enters the backward of ``loss``, a scalar: 1 / the window's weight, times the loss scale.

        The first call of a window waits until the sum over the ranks is there.
        """
        factor = torch.full_like(loss, self.agree())
        return factor if self.state.loss_scale is None else factor.mul_(self.state.loss_scale)

    def agree(self) -> float:
        """1 / the window's total weight; every rank calls this at least once a window."""
        if self._factor is None:
            weight, self.stop_votes = self.state.control.finish()
            self.total_weight = weight // self._replicas
            self._factor = 1.0 / max(self.total_weight, 1)
        return self._factor

    def count(self, loss: Tensor) -> None:
        """Add a microbatch's loss to the window's."""
        detached, state = loss.detach(), self.state
        state.loss = detached if state.loss is None else state.loss + detached
