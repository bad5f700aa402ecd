"""Checking what the plain process shares with the recipe's plugins: clipping, learning rate and optimizer, by formula.

A plugin that owns one of those slots may carry a module ``textbook`` beside its class, written from the paper alone:

- of ``clip``: ``coefficient(options, norm) -> float``, what gradients of that norm are multiplied by;
- of ``lr``: ``factor(options, step, total) -> float``, for step ``step`` (0 is the first) of ``total``;
- of ``optimizer``: ``rate(options) -> float``, the first group's own rate; and
  ``update(options, name, role, weight, gradient, state, factor) -> Tensor``, the weight after one step at ``factor``
  times the options' rates. ``state`` maps the optimizer's keys of that parameter to tensors, is empty before the first
  step, and is changed to what it is afterwards.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from torch import Tensor

from camshaft.host import plugin_class
from camshaft.verify.judge import Deviation, gap, number
from camshaft.verify.record import Recording, Step


def find(plugin: str) -> ModuleType | None:
    """The textbook that the plugin carries, or that of the nearest class it inherits from."""
    packages = dict.fromkeys(each.__module__.split(".")[0] for each in plugin_class(plugin).__mro__)
    for package in packages:
        if package in ("builtins", "camshaft"):
            continue
        spec = importlib.util.find_spec(package)
        if spec is None or spec.submodule_search_locations is None:  # a plugin that is one file
            continue
        name = f"{package}.textbook"
        if importlib.util.find_spec(name) is not None:
            return importlib.import_module(name)
    return None


class Textbooks:
    """The textbooks of the owners of ``clip``, ``lr`` and ``optimizer``; ``owners``: slot to plugin."""

    def __init__(self, owners: Mapping[str, str], options: Mapping[str, Any], bounds: Mapping[str, float]) -> None:
        self.owners, self._options, self._bounds = owners, options, bounds
        self._books = {slot: find(name) for slot, name in owners.items()}

    @property
    def missing(self) -> list[str]:
        """Plugins whose own formula nothing is compared with."""
        return [self.owners[slot] for slot, book in self._books.items() if book is None]

    def first(self, found: Recording) -> tuple[str, Deviation] | None:
        """The first number that is not what a textbook says, and the plugin that made it."""
        for slot, deviation in self._all(found):
            if not deviation.value <= deviation.bound:
                return self.owners.get(slot, ""), deviation
        return None

    def _all(self, found: Recording) -> Iterator[tuple[str, Deviation]]:
        book = self._books.get("optimizer")
        if book is not None:
            off = number(found.rate, book.rate(self._options[self.owners["optimizer"]]))
            yield "optimizer", Deviation(0, "lr", "", off, self._bounds["lr"])
        weights, state = found.start, dict[str, Tensor | None]()
        for step in found.steps:
            yield from self._clip(step)
            factor = self._factor(step, found.total)
            yield from self._rate(step, found.rate, factor)
            yield from self._update(step, found.roles, weights, state, factor)
            weights, state = step.weights, dict(step.optimizer)

    def _clip(self, step: Step) -> Iterator[tuple[str, Deviation]]:
        owner, book, wanted = self.owners.get("clip"), self._books.get("clip"), 1.0
        if owner is not None:
            norm = math.sqrt(
                math.fsum(float(g.double().square().sum()) for g in step.gradients.values() if g is not None)
            )
            yield "clip", Deviation(step.step, "norm", "", number(step.norm, norm), self._bounds["norm"])
            if book is None:
                return
            wanted = book.coefficient(self._options[owner], norm)
        off = number(step.coefficient, wanted)
        yield "clip", Deviation(step.step, "coefficient", "", off, self._bounds["coefficient"])
        for name, raw in step.gradients.items():
            value = gap(step.clipped.get(name), None if raw is None else raw * wanted)
            yield "clip", Deviation(step.step, "clipped", name, value, self._bounds["clipped"])

    def _factor(self, step: Step, total: int) -> float | None:
        """What the learning rate is multiplied by; None where nobody says."""
        owner, book = self.owners.get("lr"), self._books.get("lr")
        if owner is None:
            return 1.0
        return None if book is None else float(book.factor(self._options[owner], step.step - 1, total))

    def _rate(self, step: Step, rate: float, factor: float | None) -> Iterator[tuple[str, Deviation]]:
        if factor is not None:
            off = abs(step.lr / rate - factor) if rate else abs(step.lr)  # of the peak: a decay may end at 0
            yield "lr", Deviation(step.step, "lr", "", off, self._bounds["lr"])

    def _update(
        self,
        step: Step,
        roles: Mapping[str, str],
        weights: Mapping[str, Tensor | None],
        state: Mapping[str, Tensor | None],
        factor: float | None,
    ) -> Iterator[tuple[str, Deviation]]:
        book = self._books.get("optimizer")
        if book is None or factor is None:
            return
        options = self._options[self.owners["optimizer"]]
        for name, before in weights.items():
            gradient, wanted = step.clipped.get(name), before
            own = {key.rpartition("/")[2]: value for key, value in state.items() if key.rpartition("/")[0] == name}
            if gradient is not None and before is not None:
                wanted = book.update(options, name, roles[name], before, gradient, own, factor)
                for key, value in own.items():
                    off = gap(step.optimizer.get(f"{name}/{key}"), value)
                    yield (
                        "optimizer",
                        Deviation(step.step, "optimizer", f"{name}/{key}", off, self._bounds["optimizer"]),
                    )
            off = gap(step.weights.get(name), wanted)
            yield "optimizer", Deviation(step.step, "weights", name, off, self._bounds["weights"])
