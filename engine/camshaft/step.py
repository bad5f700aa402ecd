"""One step: the program's actions bound to callables, and what the core itself does for each kind."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from camshaft import bind
from camshaft.errors import PluginError
from camshaft.halving import Halver
from camshaft.host import Host
from camshaft.program import CLOSING, Action, Kind
from camshaft.state import State
from camshaft.strokes import Strokes

Handler = Callable[[Action], None]
Bound = tuple[tuple[Handler, Action, str], ...]
Beat = Callable[[int, str], None]
PHASES = {
    Kind.F: "forward",
    Kind.B: "backward",
    Kind.I: "backward",
    Kind.W: "backward",
    Kind.REDUCE: "reduce",
    Kind.CLIP: "clip",
    Kind.STEP: "optimizer",
}
"""What a rank is said to be doing during an action."""


def silent(step: int, phase: str) -> None:
    """A beat that nobody hears."""


class Stepper:
    """Runs windows: the checked program with every action bound to who runs it."""

    def __init__(self, host: Host, state: State, program: tuple[Action, ...]) -> None:
        self.state = state
        self.strokes = state.strokes = Strokes(host, state, program)
        self._reduce = bind.event(host, "reduce")
        self._reduce_parts = bind.event(host, "reduce_parts")
        # The owner of precision divides out the loss scale there: the others see gradients without it.
        precision = host.owner("precision")
        self._post_reduce = bind.event(host, "post_reduce", first=None if precision is None else precision[0])
        self._masters, self._watch = state.masters, host.watch
        self._clip = bind.slot(host, "clip")
        self._lr = bind.slot(host, "lr")
        self._parameters = tuple(state.model.parameters())
        self._release = bind.slot(host, "release") or self._free
        self._step = bind.middleware(host, "around_step", state, self._innermost_step(host))
        self.post_step = bind.event(host, "post_step") or (lambda state: None)
        self._losses: list[Tensor | None] = [None] * state.world.batch.accumulation
        self.program = self._bind(host, program)
        self._halver: Halver | None = None
        if state.world.recipe.batch.on_out_of_memory == "halve":
            self._halver = Halver(state, self.strokes, self._restart)
            self.program = tuple(each for each in self.program if each[1].kind in CLOSING)
        for group in state.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    @property
    def stop_votes(self) -> int:
        """How many ranks were asked to stop before the window just run."""
        return self.strokes.stop_votes

    def run(self, stop_requested: bool, beat: Beat = silent) -> None:
        """Run one window; ``state.window`` is set. ``stop_votes`` then tells how many ranks were asked to stop.

        ``beat`` is told what comes next, so that a rank that dies can be said to have died there.
        """
        state = self.state
        self.strokes.start_window(stop_requested)
        state.grad_norm, state.skipped = None, False
        self.strokes.seed()
        if self._halver is not None:
            self._halver.run(beat)
        for call, action, phase in self.program:
            beat(state.step, phase)
            call(action)

    def _restart(self) -> None:
        """Make undone what forwards and backwards of this window have done."""
        self._release(self.state)
        self.state.loss = None
        self.strokes.seed()

    def _bind(self, host: Host, program: tuple[Action, ...]) -> Bound:
        table: dict[Kind, Handler] = {
            Kind.F: self._do_forward,
            Kind.B: self._do_backward,
            Kind.REDUCE: self._do_reduce,
            Kind.CLIP: self._do_clip,
            Kind.STEP: self._do_step,
        }
        owners = dict.fromkeys(table, "core")
        scheduler = host.owner("schedule")
        for name, handlers in host.call("handlers", self.state):
            for kind, handler in handlers.items():
                # Who says in which order microbatches go may also say how; nobody else takes them from the core.
                yields = kind in (Kind.F, Kind.B) and scheduler is not None and scheduler[0] == name
                if kind in owners and not (yields and owners[kind] == "core"):
                    raise PluginError(name, "handlers", f"action {kind.name} already belongs to '{owners[kind]}'")
                owners[kind], table[kind] = name, handler
        missing = sorted({action.kind.name for action in program if action.kind not in table})
        if missing:
            raise PluginError("?", "handlers", f"the program has actions that nobody runs: {', '.join(missing)}")
        self.actors = frozenset(owners[action.kind] for action in program) - {"core"}
        return tuple((table[action.kind], action, PHASES.get(action.kind, "step")) for action in program)

    def _innermost_step(self, host: Host) -> Callable[[], None]:
        owner, state = bind.slot(host, "step"), self.state
        if owner is None:
            return state.optimizer.step
        return lambda: owner(state)

    def _do_forward(self, action: Action) -> None:
        self._losses[action.microbatch] = self.strokes.forward(action)

    def _do_backward(self, action: Action) -> None:
        loss, strokes = self._losses[action.microbatch], self.strokes
        assert loss is not None
        strokes.begin_backward(action)
        torch.autograd.backward(loss, strokes.scale(loss))
        self._losses[action.microbatch] = None
        strokes.count(loss)
        strokes.end_backward()

    def _do_reduce(self, _: Action) -> None:
        self.strokes.agree()  # a rank without a loss has not asked yet
        self.strokes.end_window()
        if self._watch is not None:
            self._watch.compare_copies()
        if self._reduce is not None:
            self._reduce(self.state)
        if self._masters is not None:
            self._masters.take_gradients()
        if self._reduce_parts is not None:
            self._reduce_parts(self.state)
        if self._post_reduce is not None:
            self._post_reduce(self.state)

    def _do_clip(self, _: Action) -> None:
        if self._clip is not None:
            self.state.grad_norm = self._clip(self.state)

    def _free(self, _: State) -> None:
        """Drop every gradient, also of parameters that train but are in no group of the optimizer."""
        for parameter in self._parameters:
            parameter.grad = None
        for part in self.state.world.parts:
            part.tensor.grad = None

    def _do_step(self, _: Action) -> None:
        state = self.state
        assert state.window is not None
        groups = state.optimizer.param_groups
        if self._lr is not None:
            factor = self._lr(state.step)
            for group in groups:
                group["lr"] = group["initial_lr"] * factor
        state.lr = groups[0]["lr"]
        self._step()
        state.gradient_scale = None
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
