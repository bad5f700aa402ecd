"""Whether what was chosen is ever called, so that nothing that a recipe names stays without effect in silence.

The built-in decoder calls the operations of ``registry`` through the table that it was built with. Of a model of
somebody else's each operation is watched as it is called, and optimizers are seen to look their update up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Module

from camshaft_kernels.choice import Choice
from camshaft_kernels.registry import AUTO, OPS

if TYPE_CHECKING:
    from camshaft.state import State, World


class Lookups(dict[str, Any]):
    """A dictionary that remembers which of its keys were asked for."""

    def __init__(self, entries: dict[str, Any]) -> None:
        super().__init__(entries)
        self.asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """As of any dictionary."""
        self.asked.add(key)
        return super().get(key, default)


class Usage:
    """Watches the entries of one run. Made in ``rewrite``, before anybody has taken a reference."""

    def __init__(self, world: World, *, foreign: bool) -> None:
        """``foreign``: an enabled plugin builds a model of its own."""
        self._world, self._foreign = world, foreign
        self._called: set[str] = set()
        ops = world.ops
        self._updates, self._others = Lookups(ops.updates), Lookups(ops.others)
        ops.updates, ops.others = self._updates, self._others

    def watch(self, op: str, entries: dict[str, Any]) -> dict[str, Any]:
        """``entries`` of ``op``, those whose calls have to be seen each in a function that sees them."""
        place = OPS[op].place if op in OPS else "nowhere"
        if place == "clip" or (self._foreign and place in ("layers", "loss", "nowhere") and op in OPS):
            return {name: self._seen(op, value) if callable(value) else value for name, value in entries.items()}
        return entries

    def _seen(self, op: str, function: Callable[..., Any]) -> Callable[..., Any]:
        called = self._called

        def add() -> bool:
            called.add(op)
            return True

        # Called once, when a caller is traced, where that is compiled.
        note: Callable[[], bool] = torch.compiler.assume_constant_result(add)  # type: ignore[no-untyped-call]

        def call(*arguments: Any, **named: Any) -> Any:
            note()
            return function(*arguments, **named)

        return call

    def idle(self, choices: Iterable[Choice], state: State) -> list[str]:
        """Operations that were named and changed, and that nothing has called by the end of the first step."""
        built_in = not self._foreign and _holds(state.model, state.world)
        return [
            choice.op
            for choice in choices
            if choice.changes and choice.asked != AUTO and not self._used(choice.op, built_in)
        ]

    def _used(self, op: str, built_in: bool) -> bool:
        place = OPS[op].place if op in OPS else None
        if place is None:
            return op in self._others.asked
        if place == "optimizer":
            return op in self._updates.asked
        if place == "clip":
            return op in self._called
        if place == "loss" and not self._world.makes_loss:
            return True  # it is made on another rank
        return built_in or op in self._called


def _holds(model: Module, world: World) -> bool:
    """Whether ``model`` was built with this world's table, as the built-in decoder is."""
    return any(vars(module).get("ops") is world.ops for module in model.modules())
