"""Runs a program: forward and backward of each stage, and what stages of one rank hand to each other.

Between F and B (or I) of a microbatch a stage holds its graph and its input. Of its output only the edge of the graph
is held, so that its memory goes when it has been sent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from camshaft.program import Action, Kind
from camshaft.state import State
from camshaft_pipeline.schedule import Schedule
from camshaft_pipeline.transport import Form, Transport

if TYPE_CHECKING:
    from camshaft.data.loader import Batch
    from camshaft.hookspecs import Forward
    from camshaft_pipeline.deferral import Deferral
    from camshaft_pipeline.ties import Ties

Handler = Callable[[Action], None]
Place = tuple[int, int]
"""(microbatch, stage)."""


class Live(NamedTuple):
    """What is held of a microbatch in a stage from its F on."""

    hidden: Tensor | None
    edge: GradientEdge | None
    loss: Tensor | None


class Executor:
    """The handlers of one rank."""

    def __init__(self, state: State, schedule: Schedule, transport: Transport, ties: Ties, deferral: Deferral) -> None:
        self._state, self._schedule, self._transport = state, schedule, transport
        self._ties, self._deferral = ties, deferral
        self._place = state.world.mesh.shape.coordinates(state.world.rank)["pp"]
        self._live: dict[Place, Live] = {}
        self._local: dict[Place, Tensor | None] = {}
        """Activations for a stage of this rank, made by the one before it, which is here too."""
        self._gradients: dict[Place, Tensor | None] = {}
        self._open = False
        self.began = 0.0
        """Wall-clock time at which the last computation had all that it needs."""

    def handlers(self) -> Mapping[Kind, Handler]:
        """A callable for each kind of action."""
        table: dict[Kind, Handler] = {
            Kind.F: self._forward,
            Kind.B: self._backward,
            Kind.I: self._inputs,
            Kind.W: self._weights,
        }
        for kind in (Kind.SEND_F, Kind.RECV_F, Kind.SEND_B, Kind.RECV_B):
            table[kind] = self._transfer
        return table

    def end_window(self) -> None:
        """Wait until everything is sent; before the weights change."""
        self._open = False
        self._transport.line.settle()
        self._ties.end_window()

    def _start(self) -> None:
        if not self._open:
            self._open = True
            self._transport.start_window()
            self._ties.start_window()

    def _transfer(self, action: Action) -> None:
        self._start()
        self._transport.run(action)

    def _forward(self, action: Action) -> None:
        self._start()
        _, microbatch, stage = action
        strokes = self._state.strokes
        assert strokes is not None
        hidden = self._input(microbatch, stage)
        self._ties.before_forward(stage)
        self.began = time.time()
        made = strokes.forward(action, hidden)
        edge = get_gradient_edge(made) if made.requires_grad else None
        last = stage == self._schedule.stages - 1
        if last:
            strokes.count(made)
        else:
            self._hand_on(microbatch, stage, made)
        self._live[microbatch, stage] = Live(hidden, edge, made.detach() if last else None)

    def _input(self, microbatch: int, stage: int) -> Tensor | None:
        """What the stage before made, as the leaf of a new graph."""
        if stage == 0:
            return None
        if self._is_here(stage - 1):
            return self._local.pop((microbatch, stage))
        hidden = self._transport.take(Action(Kind.RECV_F, microbatch, stage))
        assert hidden is not None
        return hidden.requires_grad_(self._transport.forms[stage - 1].trains)

    def _hand_on(self, microbatch: int, stage: int, made: Tensor) -> None:
        forms = self._transport.forms
        if stage not in forms:
            forms[stage] = Form.of(made)
        if self._is_here(stage + 1):
            self._local[microbatch, stage + 1] = made.detach().requires_grad_(made.requires_grad)
        else:
            self._transport.put(Action(Kind.SEND_F, microbatch, stage), made.detach().contiguous())

    def _backward(self, action: Action) -> None:
        live, gradient = self._begin_backward(action)
        if live.edge is not None:
            torch.autograd.backward(live.edge, gradient)
        self._hand_back(action, live.hidden, None if live.hidden is None else live.hidden.grad)
        self._end_backward(action)

    def _inputs(self, action: Action) -> None:
        live, gradient = self._begin_backward(action)
        towards = None
        if live.edge is not None:
            copies = self._ties.copies(action.stage)
            trains = live.hidden is not None and live.hidden.requires_grad
            inputs = copies if live.hidden is None or not trains else [*copies, live.hidden]
            found = self._deferral.inputs(action[1:], live.edge, gradient, inputs)
            for copy, part in zip(copies, found, strict=False):
                _add(copy, part)
            towards = found[-1] if trains else None
        self._hand_back(action, live.hidden, towards)
        self._ties.after_backward(action.stage)

    def _weights(self, action: Action) -> None:
        strokes = self._state.strokes
        assert strokes is not None
        self.began = time.time()
        strokes.begin_backward(action)
        self._deferral.weights(action[1:])
        strokes.end_backward()

    def _begin_backward(self, action: Action) -> tuple[Live, Tensor | None]:
        """What F left, and the gradient that enters the stage; none where nothing of it trains."""
        strokes = self._state.strokes
        assert strokes is not None
        _, microbatch, stage = action
        live = self._live.pop((microbatch, stage))
        strokes.begin_backward(action)
        self._ties.before_backward(stage)
        if live.loss is not None:
            gradient: Tensor | None = strokes.scale(live.loss)
        elif self._is_here(stage + 1):
            gradient = self._gradients.pop((microbatch, stage))
        else:
            gradient = self._transport.take(Action(Kind.RECV_B, microbatch, stage))
        self.began = time.time()
        return live, gradient

    def _end_backward(self, action: Action) -> None:
        strokes = self._state.strokes
        assert strokes is not None
        self._ties.after_backward(action.stage)
        strokes.end_backward()

    def _hand_back(self, action: Action, hidden: Tensor | None, gradient: Tensor | None) -> None:
        """Give the gradient of a stage's input to the stage before."""
        if hidden is None:
            return
        hidden.grad = None
        if gradient is None and hidden.requires_grad:
            gradient = torch.zeros_like(hidden)
        _, microbatch, stage = action
        if self._is_here(stage - 1):
            self._gradients[microbatch, stage - 1] = gradient
        else:
            sent = None if gradient is None else gradient.contiguous()
            self._transport.put(Action(Kind.SEND_B, microbatch, stage), sent)

    def evaluate(self, batch: Batch, call: Forward) -> Tensor:
        """Pass ``batch`` through all stages of the pipeline: its loss where that is made, elsewhere 0."""
        self._ties.start_window()
        made: dict[int, Tensor] = {}
        stages = self._schedule.stages_of(self._place)
        for stage in stages:
            hidden = made.pop(stage - 1, None)
            if stage and hidden is None:
                hidden = self._transport.receive_pass(stage, batch.tokens.shape)
            self._ties.before_forward(stage)
            out = call(replace(batch, stage=stage, hidden=hidden))
            if stage == self._schedule.stages - 1 or self._is_here(stage + 1):
                made[stage] = out
            else:
                self._transport.send_pass(stage, batch.tokens.shape, out)
        loss = made.get(self._schedule.stages - 1)
        return torch.zeros((), device=batch.tokens.device) if loss is None else loss

    def _is_here(self, stage: int) -> bool:
        return self._schedule.placement[stage] == self._place


def _add(leaf: Tensor, gradient: Tensor | None) -> None:
    """Add to a leaf's gradient as autograd would, outside of it."""
    if gradient is None:
        return
    if leaf.grad is None:
        leaf.grad = gradient.to(leaf.grad_dtype or leaf.dtype)
    else:
        leaf.grad.add_(gradient)
