"""Comparing two recordings: every deviation in the order in which a step makes its numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from camshaft.testing.record import distance
from camshaft.verify.record import Recording, Step, Tensors

BOUNDS: Mapping[str, Mapping[str, float]] = {
    "fp64": {
        "gradients": 1e-12, "norm": 1e-12, "clipped": 1e-12, "coefficient": 1e-12, "lr": 1e-14, "weights": 1e-12,
        "optimizer": 1e-12, "loss": 1e-12, "evaluation": 1e-12,
    },
    "fp32": {
        "gradients": 1e-4, "norm": 2e-6, "clipped": 1e-4, "coefficient": 2e-6, "lr": 1e-14, "weights": 1e-4,
        "optimizer": 1e-4, "loss": 2e-6, "evaluation": 2e-6,
    },
    "bf16": {"loss": 1e-3, "norm": 5e-3, "weights": 1e-2, "evaluation": 1e-3},
}  # fmt: skip
"""Largest relative deviation by quantity, in the order in which a step makes them. fp64: sums in another order differ
by 1e-15. Narrower dtypes: as measured over all combinations of the parity matrix, rounded up once.
"""


def bounds_of(compute: str, *, evaluates: bool) -> Mapping[str, float]:
    """Bounds in ``compute`` (bf16's for narrower dtypes) of what there is."""
    found = BOUNDS.get(compute, BOUNDS["bf16"])
    return {quantity: bound for quantity, bound in found.items() if evaluates or quantity != "evaluation"}


@dataclass(frozen=True, slots=True)
class Deviation:
    """How far one tensor or number is from the plain process's, relative to its scale."""

    step: int
    quantity: str
    name: str
    value: float
    bound: float

    def __str__(self) -> str:
        what = f"{self.quantity} of '{self.name}'" if self.name else self.quantity
        return f"step {self.step}, {what}: off by {self.value:.2e} (bound {self.bound:.0e})"


@dataclass(frozen=True, slots=True)
class Comparison:
    """The worst deviation of each quantity, how many values were compared, and the first one beyond its bound."""

    worst: Mapping[str, Deviation]
    compared: Mapping[str, int]
    first: Deviation | None


def compare(found: Recording, plain: Recording, bounds: Mapping[str, float]) -> Comparison:
    """All of ``found`` beside ``plain``; other steps, names or missing gradients are infinite deviations."""
    worst: dict[str, Deviation] = {}
    compared = dict.fromkeys(bounds, 0)
    first: Deviation | None = None
    for each in _deviations(found, plain, bounds):
        compared[each.quantity] += 1
        if each.quantity not in worst or not each.value <= worst[each.quantity].value:
            worst[each.quantity] = each
        if first is None and not each.value <= each.bound:
            first = each
    return Comparison(worst, compared, first)


def _deviations(found: Recording, plain: Recording, bounds: Mapping[str, float]) -> Iterator[Deviation]:
    if "weights" in bounds:
        yield from _tensors(0, "weights", found.start, plain.start, bounds["weights"])
    for one, other in zip(found.steps, plain.steps, strict=False):
        for quantity, bound in bounds.items():
            yield from _of_step(one, other, quantity, bound)
    if len(found.steps) != len(plain.steps) or not plain.steps:  # without any step nothing was compared
        yield Deviation(min(len(found.steps), len(plain.steps)) + 1, next(iter(bounds)), "(the step)", math.inf, 0.0)


def _of_step(one: Step, other: Step, quantity: str, bound: float) -> Iterator[Deviation]:
    left, right = getattr(one, quantity), getattr(other, quantity)
    if isinstance(right, Mapping):
        yield from _tensors(one.step, quantity, left, right, bound)
    elif left is not None or right is not None:
        yield Deviation(one.step, quantity, "", number(left, right), bound)


def _tensors(step: int, quantity: str, found: Tensors, plain: Tensors, bound: float) -> Iterator[Deviation]:
    for name in [*plain, *(name for name in found if name not in plain)]:
        yield Deviation(step, quantity, name, gap(found.get(name), plain.get(name)), bound)


def gap(one: Tensor | None, other: Tensor | None) -> float:
    """Relative L2 distance; infinite where one is missing, or holds what is no number."""
    if one is None or other is None:
        return 0.0 if one is other else math.inf
    value = distance(one, other)
    return math.inf if math.isnan(value) else value


def number(one: float | None, other: float | None) -> float:
    """Relative difference; infinite where one is missing, or no number."""
    if one is None or other is None:
        return math.inf
    value = abs(one - other) / abs(other) if other else abs(one)
    return math.inf if math.isnan(value) else value
