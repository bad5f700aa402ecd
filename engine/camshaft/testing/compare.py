"""Comparing two recorded runs: worst deviation of each quantity, and where it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from camshaft.testing.record import StepRecord, distance

Worst = dict[str, tuple[float, str]]
TENSORS, NUMBERS = ("gradients", "weights", "optimizer"), ("norm", "loss", "lr")


def compare(records: Sequence[StepRecord], reference: Sequence[StepRecord]) -> Worst:
    """Worst relative deviation of each quantity over all steps: {quantity: (deviation, place)}.

    Tensors by relative L2 distance, numbers by relative difference; a NaN counts as infinite.

    Raises:
        AssertionError: other steps, other names, or a gradient on one side only.
    """
    assert [record.step for record in records] == [record.step for record in reference]
    worst: Worst = dict.fromkeys((*TENSORS, *NUMBERS), (0.0, "-"))

    def note(quantity: str, deviation: float, place: str) -> None:
        if not deviation <= worst[quantity][0]:  # also true for NaN, which must not pass
            worst[quantity] = (math.inf if math.isnan(deviation) else deviation, place)

    for got, wanted in zip(records, reference, strict=True):
        for quantity in TENSORS:
            one, other = getattr(got, quantity), getattr(wanted, quantity)
            assert one.keys() == other.keys(), (quantity, got.step, sorted(one.keys() ^ other.keys()))
            for name in one:
                place = f"step {got.step} {name}"
                if one[name] is None or other[name] is None:
                    assert one[name] is other[name], f"{place}: a gradient on one side only"
                    continue
                note(quantity, distance(one[name], other[name]), place)
        for quantity in NUMBERS:
            one, other = getattr(got, quantity), getattr(wanted, quantity)
            assert (one is None) == (other is None), f"{quantity} on one side only"
            if one is not None:
                note(quantity, abs(one - other) / abs(other) if other else abs(one), f"step {got.step}")
    return worst


def assert_within(worst: Worst, bounds: Mapping[str, float]) -> None:
    """Every named quantity at or under its bound."""
    over = {key: worst[key] for key, bound in bounds.items() if not worst[key][0] <= bound}
    assert not over, f"over the bound: {over}; bounds {dict(bounds)}"


def assert_bit_equal(one: Sequence[StepRecord], other: Sequence[StepRecord]) -> None:
    """Every tensor and number equal in every bit."""
    for got, wanted in zip(one, other, strict=True):
        if got is wanted:  # ranks that reported the same
            continue
        for quantity in TENSORS:
            left, right = getattr(got, quantity), getattr(wanted, quantity)
            assert left.keys() == right.keys(), sorted(left.keys() ^ right.keys())
            for name in left:
                same = left[name] is right[name] if left[name] is None else torch.equal(left[name], right[name])
                assert same, f"step {got.step} {quantity} {name}"
        assert (got.step, got.norm, got.loss, got.lr) == (wanted.step, wanted.norm, wanted.loss, wanted.lr)
