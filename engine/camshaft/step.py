"""One step: the program's actions bound to callables, and what the core itself does for each kind."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from camshaft import bind
from camshaft.errors import PluginError
from camshaft.host import Host
from camshaft.program import Action, Kind
from camshaft.state import State

Bound = tuple[tuple[Callable[[int], None], int, str], ...]
Beat = Callable[[int, str], None]
PHASES = {
    Kind.F: "forward",
    Kind.B: "backward",
    Kind.REDUCE: "reduce",
    Kind.CLIP: "clip",
    Kind.STEP: "optimizer",
}
"""What a rank is said to be doing during an action."""


def silent(step: int, phase: str) -> None:
    """A beat that nobody hears."""


class Stepper:
    """Runs windows: the checked program with every action bound, and the numbers that divide the loss.

    The loss is a pair (sum, weight). Only here is it divided: once, by the weight summed over the window and over
    every axis that splits the batch, before the first backward, so that gradients come out final in scale.
    """

    def __init__(self, host: Host, state: State, program: tuple[Action, ...]) -> None:
        self.state = state
        world = state.world
        self.replicas = world.world_size // world.mesh.shape.batch_degree
        self.forward_call = bind.middleware(host, "around_forward", state, state.model)
        self._pre_forward = bind.event(host, "pre_forward")
        self._post_backward = bind.event(host, "post_backward")
        self._reduce = bind.event(host, "reduce")
        # The owner of precision divides out the loss scale there: the others see gradients without it.
        precision = host.owner("precision")
        self._post_reduce = bind.event(host, "post_reduce", first=None if precision is None else precision[0])
        self._masters = state.masters
        self._clip = bind.slot(host, "clip")
        self._lr = bind.slot(host, "lr")
        self._parameters = tuple(state.model.parameters())
        self._release = bind.slot(host, "release") or self._free
        self._step = bind.middleware(host, "around_step", state, self._innermost_step(host))
        self.post_step = bind.event(host, "post_step") or (lambda state: None)
        self._losses: list[Tensor | None] = [None] * world.batch.accumulation
        self._last = [action.microbatch for action in program if action.kind is Kind.B][-1]
        self._scale: Tensor | None = None
        self.stop_votes = 0
        self.program = self._bind(host, program)
        for group in state.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    def run(self, stop_requested: bool, beat: Beat = silent) -> None:
        """Run one window; ``state.window`` is set. ``stop_votes`` then tells how many ranks were asked to stop.

        ``beat`` is told what comes next, so that a rank that dies can be said to have died there.
        """
        state = self.state
        assert state.window is not None
        state.control.start((state.window.weight, int(stop_requested)))
        state.loss, state.grad_norm, state.skipped = None, None, False
        self._scale = None
        seed_step(state)
        for call, microbatch, phase in self.program:
            beat(state.step, phase)
            call(microbatch)

    def _bind(self, host: Host, program: tuple[Action, ...]) -> Bound:
        table: dict[Kind, Callable[[int], None]] = {
            Kind.F: self._do_forward,
            Kind.B: self._do_backward,
            Kind.REDUCE: self._do_reduce,
            Kind.CLIP: self._do_clip,
            Kind.STEP: self._do_step,
        }
        owners = dict.fromkeys(table, "core")
        for name, handlers in host.call("handlers", self.state):
            for kind, handler in handlers.items():
                if kind in owners:
                    raise PluginError(name, "handlers", f"action {kind.name} already belongs to '{owners[kind]}'")
                owners[kind], table[kind] = name, handler
        missing = sorted({action.kind.name for action in program if action.kind not in table})
        if missing:
            raise PluginError("?", "handlers", f"the program has actions that nobody runs: {', '.join(missing)}")
        self.actors = frozenset(owners[action.kind] for action in program) - {"core"}
        return tuple((table[action.kind], action.microbatch, PHASES.get(action.kind, "step")) for action in program)

    def _innermost_step(self, host: Host) -> Callable[[], None]:
        owner, state = bind.slot(host, "step"), self.state
        if owner is None:
            return state.optimizer.step
        return lambda: owner(state)

    def _do_forward(self, microbatch: int) -> None:
        state = self.state
        assert state.window is not None
        state.microbatch = microbatch
        batch = state.window.batches[microbatch]
        if self._pre_forward is not None:
            self._pre_forward(state, batch)
        self._losses[microbatch] = self.forward_call(batch)

    def _do_backward(self, microbatch: int) -> None:
        state, loss = self.state, self._losses[microbatch]
        assert loss is not None
        state.microbatch = microbatch
        state.final_backward = microbatch == self._last
        if self._scale is None:
            self._scale = self._agree(loss)
        torch.autograd.backward(loss, self._scale)
        self._losses[microbatch] = None
        detached = loss.detach()
        state.loss = detached if state.loss is None else state.loss + detached
        if self._post_backward is not None:
            self._post_backward(state)

    def _agree(self, loss: Tensor) -> Tensor:
        """Wait for the window's total weight, and return 1 / weight as the gradient that enters each backward."""
        weight, self.stop_votes = self.state.control.finish()
        self.total_weight = weight // self.replicas
        scale = torch.full_like(loss, 1.0 / max(self.total_weight, 1))
        return scale if self.state.loss_scale is None else scale.mul_(self.state.loss_scale)

    def _do_reduce(self, _: int) -> None:
        if self._reduce is not None:
            self._reduce(self.state)
        if self._masters is not None:
            self._masters.take_gradients()
        if self._post_reduce is not None:
            self._post_reduce(self.state)

    def _do_clip(self, _: int) -> None:
        if self._clip is not None:
            self.state.grad_norm = self._clip(self.state)

    def _free(self, _: State) -> None:
        """Drop every gradient, also of parameters that train but are in no group of the optimizer."""
        for parameter in self._parameters:
            parameter.grad = None
        for part in self.state.world.parts:
            part.tensor.grad = None

    def _do_step(self, _: int) -> None:
        state = self.state
        assert state.window is not None
        groups = state.optimizer.param_groups
        if self._lr is not None:
            factor = self._lr(state.step)
            for group in groups:
                group["lr"] = group["initial_lr"] * factor
        state.lr = groups[0]["lr"]
        self._step()
        if state.skipped:
            state.grad_norm = None  # of gradients that nothing used; not finite, while the run is sound
        elif self._masters is not None:
            self._masters.give_weights()
        self._release(state)
        if self._masters is not None:
            self._masters.drop_gradients()
        state.step += 1
        state.consumed_samples += state.window.samples
        state.consumed_tokens += state.window.tokens


def seed_step(state: State) -> None:
    """Seed torch's generators from (seed, step, part of the batch), so that random numbers need no saved state.

    A resumed run draws what an undisturbed one would have drawn; ranks that share their part of the batch draw alike.
    """
    world = state.world
    index = world.mesh.shape.batch_index(world.rank)
    key = f"{world.recipe.seed}/{state.step}/{index}".encode()
    seed = int.from_bytes(hashlib.blake2b(key, digest_size=7).digest())
    torch.default_generator.manual_seed(seed)
    if world.device.type == "cuda":
        torch.cuda.manual_seed(seed)
