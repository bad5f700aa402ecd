"""What is recorded of a step on its way: raw gradients, norm, clipped gradients, rate, weights, optimizer, loss."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from camshaft.errors import CamshaftError
from camshaft.meter import global_sums
from camshaft.plugin import Plugin, hookimpl
from camshaft.state import Policy, State, World
from camshaft.testing.record import gradients, optimizer_state, weights
from camshaft.verify import copies

if TYPE_CHECKING:
    from camshaft.hookspecs import LogRecord

Tensors = Mapping[str, Tensor | None]
EVALUATION = "eval/loss"


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step; tensors are whole, on the CPU, by name. A parameter without a gradient has None.

    ``coefficient`` is what clipping multiplied the gradients by, measured on them, and ``weights`` are the masters of
    what trains.
    """

    step: int
    gradients: Tensors
    norm: float | None
    clipped: Tensors
    coefficient: float | None
    lr: float
    weights: Tensors
    optimizer: Tensors
    loss: float
    evaluation: float | None = None
    """Loss of the evaluation behind it, or before the first step; None where there was none."""


@dataclass(slots=True)
class Recording:
    """A run: weights before the first step, role of each parameter, and every step."""

    start: Tensors = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    total: int = 0
    """Steps of the whole run, which a schedule of learning rates knows."""
    rate: float = 0.0
    """Rate of the optimizer's first group before anything multiplies it."""
    plugins: tuple[str, ...] = ()
    dropouts: int = 0
    """Modules that draw random numbers in training."""

    def digests(self) -> dict[str, int]:
        """Checksum of every tensor, and of the bits of every number, by where it is."""
        found = {f"step 0, weights, {name}": checksum(value) for name, value in self.start.items()}
        for step in self.steps:
            for entry in fields(step):
                value = getattr(step, entry.name)
                named = value if isinstance(value, Mapping) else {"": value}
                place = f"step {step.step}, {entry.name}"
                found |= {f"{place}, {name}".rstrip(", "): checksum(each) for name, each in named.items()}
        return found


def checksum(value: Tensor | float | None) -> int:
    """Checksum of every bit."""
    if isinstance(value, Tensor):
        return zlib.crc32(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return zlib.crc32(repr(value).encode())


class UnequalCopies(CamshaftError):
    """Ranks hold other bits of what both have; raised on all of them alike."""

    def __init__(self, place: str, message: str) -> None:
        super().__init__(f"{place}: {message}")


class Recorder(Plugin):
    """Records every step. Registered last: it sees gradients after every other plugin's ``post_reduce``."""

    draws = False

    def __init__(self, *, still: bool) -> None:
        """``still``: dropout drops nothing."""
        super().__init__()
        self._still = still
        self.recording = Recording()
        self._gradients: Tensors = {}
        self._clipped: Tensors = {}
        self._evaluation: float | None = None

    @hookimpl
    def log(self, record: LogRecord) -> None:
        """Evaluations come between a step and its ``post_step``, and one before the first step."""
        if EVALUATION in record:
            self._evaluation = float(record[EVALUATION])

    @hookimpl
    def pre_run(self, state: State) -> None:
        """The first values, of which every element is counted once."""
        copies.check(state.world)
        state.world.settle()
        for module in state.model.modules():
            if isinstance(module, nn.Dropout) and module.p:
                self.recording.dropouts += 1
                module.p = 0.0 if self._still else module.p
        self.recording.start = weights(state.world, state.model)
        self.recording.roles = dict(state.world.roles)
        self.recording.total = state.world.total_steps
        self.recording.rate = state.optimizer.param_groups[0]["initial_lr"]

    @hookimpl
    def post_reduce(self, state: State) -> None:
        """Gradients before clipping."""
        with _copies(state.step + 1, "gradients"):
            self._gradients = gradients(state.world, state.model)

    @hookimpl
    def around_step(self, state: State, call: Callable[[], None]) -> Callable[[], None]:
        """Gradients as the optimizer gets them: this is the innermost."""

        def step() -> None:
            with _copies(state.step + 1, "clipped"):
                found = gradients(state.world, state.model)
            factor = state.gradient_scale
            self._clipped = {
                name: value if value is None or factor is None else value * factor.to("cpu", value.dtype)
                for name, value in found.items()
            }
            call()

        return step

    @hookimpl
    def post_step(self, state: State) -> None:
        """What the step left."""
        assert state.window is not None
        state.world.settle()
        loss, weight = global_sums(state.world, state.loss or 0.0, float(state.window.weight))
        with _copies(state.step, "weights"):
            found = weights(state.world, state.model)
        with _copies(state.step, "optimizer"):
            kept = optimizer_state(state.world, state.optimizer)
        self.recording.steps.append(
            Step(
                step=state.step,
                gradients=self._gradients,
                norm=None if state.grad_norm is None else float(state.grad_norm),
                clipped=self._clipped,
                coefficient=_ratio(self._clipped, self._gradients),
                lr=state.lr,
                weights=found,
                optimizer=kept,
                loss=loss / max(weight, 1.0),
                evaluation=self._evaluation,
            )
        )
        self._evaluation = None


@contextmanager
def _copies(step: int, quantity: str) -> Iterator[None]:
    """Say where it was that copies, of which one is to be put together, are not equal."""
    try:
        yield
    except AssertionError as error:
        raise UnequalCopies(f"step {step}, {quantity}", str(error).splitlines()[0]) from error


def _ratio(clipped: Tensors, raw: Tensors) -> float | None:
    """The factor that fits best between two sets of gradients; None without any."""
    pairs = [(one, other) for name, one in clipped.items() if one is not None and (other := raw.get(name)) is not None]
    square = math.fsum(float(other.double().square().sum()) for _, other in pairs)
    if not square:
        return None
    return math.fsum(float((one.double() * other.double()).sum()) for one, other in pairs) / square


class Dtypes(Plugin):
    """Owns ``precision`` where no compared plugin does: everything in one dtype."""

    draws = False

    def __init__(self, dtype: str) -> None:
        super().__init__()
        self._dtype: Any = {"fp64": torch.float64, "fp32": torch.float32}[dtype]

    @hookimpl
    def precision(self, world: World) -> Policy:
        """One dtype for everything."""
        return Policy(self._dtype, self._dtype, self._dtype, self._dtype)
