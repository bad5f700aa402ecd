"""Stages 1 and 2: updated parameters travel bucket by bucket while the next forward already runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn import Module, Parameter
from torch.overrides import TorchFunctionMode

from camshaft_zero.grid import Grid
from camshaft_zero.storage import Unit, publish


class Uses(TorchFunctionMode):
    """Tells of every parameter that a function of torch is called with."""

    def __init__(self, used: Callable[[Parameter], None]) -> None:
        super().__init__()
        self._used = used

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        for each in (*args, *named.values()):
            for value in each if isinstance(each, list | tuple) else (each,):
                if isinstance(value, Parameter):
                    self._used(value)
        return function(*args, **named)


class Publisher:
    """Starts the gathers of all units after a step, and lets each module wait for its own parameters.

    A unit with a parameter whose module was not called in the first window, or that somebody used before its module
    was, is one that every forward waits for at its start.
    """

    def __init__(self, units: Sequence[Unit], grid: Grid, overlap: bool) -> None:
        self._units = list(units)
        self._overlap = overlap and not grid.alone
        self._eager: list[Unit] = []
        self._called: set[Module] = set()
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._learning = True
        self._of = {parameter: unit for unit in self._units for parameter in unit.parameters}
        self._arrived: set[Unit] = set()
        self._early: set[Unit] = set()
        self._last: Module | None = None
        """What the first window's forwards called last: the projection, which most memory is used behind."""
        self.reached_last: Callable[[], None] = lambda: None
        """Called before it runs."""
        if self._overlap:
            self._watch()

    def _watch(self) -> None:
        waiting: dict[Module, list[Unit]] = {}
        for unit in self._units:
            for module in unit.modules:
                waiting.setdefault(module, []).append(unit)
        for module, units in waiting.items():
            self._handles.append(module.register_forward_pre_hook(self._hook(module, tuple(units))))

    def _hook(self, module: Module, units: tuple[Unit, ...]) -> Callable[..., None]:
        called = self._called

        def arrive(_: Module, __: Any) -> None:
            if self._learning:
                called.add(module)
                self._last = module
                self._arrived.update(units)
            for unit in units:
                if unit.pending is not None:
                    unit.pending.wait()
                    unit.pending = None
            if module is self._last and not self._learning:
                self.reached_last()

        return arrive

    def learn(self, holders: Callable[[Unit], Sequence[Sequence[Module]]]) -> None:
        """After the first window: which units cannot rely on their modules being called.

        ``holders`` gives, for each parameter of a unit, the modules that hold it.
        """
        if not self._learning:
            return
        self._learning = False
        called = self._called
        self._eager = [
            unit
            for unit in self._units
            if unit in self._early or not all(any(each in called for each in of_one) for of_one in holders(unit))
        ]
        called.clear()

    def watch_forward(self) -> AbstractContextManager[object]:
        """Around a forward: in the first window, see who uses parameters before their modules are called."""
        if not (self._learning and self._overlap):
            return nullcontext()
        self._arrived.clear()
        return Uses(self._used)

    def _used(self, parameter: Parameter) -> None:
        unit = self._of.get(parameter)
        if unit is not None and unit not in self._arrived:
            self._early.add(unit)

    def start(self) -> None:
        """After the optimizer: begin to send what changed, in the order in which forward needs it."""
        if not self._overlap:
            publish(self._units, "step")
            return
        self.settle()  # of modules that no forward called, gathers of the step before may be under way
        for unit in self._units:
            unit.narrow_down()
        for pending in [unit.collect_slices("step") for unit in self._units]:
            if pending is not None:
                pending.wait()
        for unit in self._units:
            unit.pending = unit.collect_stretches("step")

    def before_forward(self) -> None:
        """Wait for the units that no module waits for."""
        self._wait(self._eager)

    def settle(self) -> None:
        """Wait for everything."""
        self._wait(self._units)

    def _wait(self, units: Sequence[Unit]) -> None:
        for unit in units:
            if unit.pending is not None:
                unit.pending.wait()
                unit.pending = None

    def close(self) -> None:
        """Wait for everything and remove every hook."""
        self.settle()
        for handle in self._handles:
            handle.remove()
        self._handles = []
