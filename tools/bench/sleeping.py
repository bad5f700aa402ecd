"""Stages that sleep instead of computing: a model for both engines whose forward, I and W take times that are known."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from camshaft.data.loader import Batch
from camshaft.models.layers import Embedding, Linear
from camshaft.models.stages import Cuttable, Span
from camshaft.plugin import Plugin, hookimpl
from camshaft.state import State
from tools.bench.peers import Job
from tools.bench.setup import engine, engine_steps

WIDTH, STD = 4, 0.02


@dataclass(slots=True)
class Naps:
    """How long each part of a stage sleeps, in seconds, and how often each slept."""

    seconds: float
    forwards: int = 0
    inputs: int = 0
    weights: int = 0

    def check(self, wanted: int) -> None:
        """Compare, and start to count anew.

        Raises:
            AssertionError: some part of a stage did not sleep ``wanted`` times.
        """
        found = (self.forwards, self.inputs, self.weights)
        assert found == (wanted,) * 3, f"(forward, I, W) slept {found} times, not {wanted} times each"
        self.forget()

    def forget(self) -> None:
        """Start to count anew."""
        self.forwards = self.inputs = self.weights = 0


class _Nap(torch.autograd.Function):
    """Sleeps in forward, and in backward where the gradient of the input is made."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, naps: Naps) -> Tensor:
        ctx.naps = naps
        naps.forwards += 1
        time.sleep(naps.seconds)
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.naps.inputs += 1
        time.sleep(ctx.naps.seconds)
        return gradient, None


class Sleeper(nn.Module):
    """One stage. A tiny product makes a gradient of a weight; ``nap_on_weights`` lets that take its time."""

    def __init__(self, naps: Naps) -> None:
        super().__init__()
        self.naps = naps
        self.product = Linear(WIDTH, WIDTH, STD)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states [b, s, WIDTH] of the same."""
        made: Tensor = self.product(_Nap.apply(hidden, self.naps))  # type: ignore[no-untyped-call]
        return made

    def nap_on_weights(self) -> None:
        """Sleep whenever the weight's gradient is made: in B, or in W where the backward is split."""

        def nap(gradient: Tensor | None) -> None:
            if gradient is not None:
                self.naps.weights += 1
                time.sleep(self.naps.seconds)

        self.product.weight.register_hook(nap)  # type: ignore[no-untyped-call]


class Sleepers(nn.Module):
    """A model of sleeping stages that the engine can cut."""

    pipeline = Cuttable("layers", ("start",), ())
    draws = False

    def __init__(self, stages: int, naps: Naps) -> None:
        super().__init__()
        self.spans: dict[int, Span] = {}
        self.start = Embedding(1, WIDTH, 1.0)
        self.layers = nn.ModuleList(Sleeper(naps) for _ in range(stages))

    def begin(self, tokens: Tensor) -> Tensor:
        """Hidden states of any tokens, all alike."""
        hidden: Tensor = self.start(torch.zeros_like(tokens))
        return hidden

    def forward(self, batch: Batch) -> Tensor:
        """What the stage makes; of the last one the loss, a sum."""
        assert batch.stage is not None
        span = self.spans[batch.stage]
        hidden = self.begin(batch.tokens) if batch.hidden is None else batch.hidden
        made: Tensor = self.layers.get_submodule(str(span.begin))(hidden)
        return made.sum() if span.last else made

    def nap_on_weights(self) -> None:
        """Tell every stage that is here."""
        for module in self.modules():
            if isinstance(module, Sleeper):
                module.nap_on_weights()


class _Builds(Plugin):
    """Owns ``build_model``."""

    draws = False

    def __init__(self, stages: int, naps: Naps) -> None:
        super().__init__()
        self._stages, self._naps = stages, naps

    @hookimpl
    def build_model(self) -> nn.Module:
        """Stages that sleep."""
        return Sleepers(self._stages, self._naps)

    @hookimpl
    def bind(self, state: State) -> None:
        """Parameters have their values now."""
        model = state.model
        assert isinstance(model, Sleepers)
        model.nap_on_weights()


class SleepingCamshaft:
    """The engine over sleeping stages."""

    def __init__(self, stages: int, seconds: float, job: Job) -> None:
        self.naps = Naps(seconds)
        self._stack = ExitStack()
        observers = {"sleepers": _Builds(stages, self.naps)}
        self._trainer = self._stack.enter_context(engine(job.resolved, job.rank, job.world_size, observers))
        self._own = stages // job.world_size * job.case.accumulation

    def steps(self, count: int) -> float:
        """Run ``count`` windows."""
        loss = engine_steps(self._trainer, count)
        self.naps.check(count * self._own)
        return loss

    def close(self) -> None:
        """Close every plugin."""
        self._stack.close()


class SleepingStage(nn.Module):
    """A stage for torch's pipelines."""

    def __init__(self, model: Sleepers, index: int) -> None:
        super().__init__()
        self.begin: Callable[[Tensor], Tensor] | None = model.begin if index == 0 else None
        self.start = model.start if index == 0 else None
        self.layer = model.layers[index]

    def forward(self, given: Tensor) -> Tensor:
        """Hidden states of tokens or hidden states."""
        made: Tensor = self.layer(given if self.begin is None else self.begin(given))
        return made
