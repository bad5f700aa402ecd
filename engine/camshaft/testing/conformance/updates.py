"""Optimizer steps over lists of tensors, beside the textbook of the optimizer that they are of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from camshaft.host import installed, plugin_class
from camshaft.verify import textbook

STEPS = 3
SHAPES = ((7, 5), (33,), (0,), (4, 3, 2), (1,))
"""Of one list: nothing that a block of a kernel divides, and a tensor without elements."""
USED: Mapping[str, Any] = {"lr": 0.03, "betas": (0.8, 0.9), "eps": 1e-6}
DECAYS = {"matrix": 0.2, "norm": 0.0}
"""Role of all tensors of a list to their decay: one call is of one group, which decays or does not."""
FACTORS = (None, 0.5)
"""What gradients are multiplied by on the way."""
KEYS = ("exp_avg", "exp_avg_sq")
"""What a textbook calls the two moments."""
BOUND = 1e-5


class NoReference(LookupError):
    """There is nothing to compare an operation with."""


Lists = tuple[list[Tensor], list[Tensor], list[Tensor]]
"""Parameters and both moments."""


def faults(name: str, provider: str, update: Callable[..., None], device: str) -> Iterator[str]:
    """One line for each tensor that ``update``, of the optimizer ``name``, leaves further from fp64 than the bound.

    Raises:
        NoReference: no textbook says what it has to do.
    """
    book = _book(name)
    for role, decay in DECAYS.items():
        for factor in FACTORS:
            got = _run(update, decay, factor, device)
            wanted = _textbook(name, book, role, factor)
            for place, (one, exact) in enumerate(zip(_flat(got), _flat(wanted), strict=True)):
                far = float((one.double().cpu() - exact).norm() / exact.norm().clamp_min(1e-30))
                if not far <= BOUND:
                    what = ("parameter", "first moment", "second moment")[place // len(SHAPES)]
                    yield (
                        f"{name} by {provider}, weight_decay {decay}, scale {factor}, {what} of "
                        f"{[*SHAPES[place % len(SHAPES)]]}: {far:.2e} > {BOUND}"
                    )


def _book(name: str) -> ModuleType:
    book = textbook.find(name) if name in installed() else None
    if book is None or not hasattr(book, "update"):
        raise NoReference(f"no installed plugin '{name}' has a textbook that says what a step of '{name}' is")
    return book


def _first(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def _run(update: Callable[..., None], decay: float, factor: float | None, device: str) -> Lists:
    """What ``update`` leaves after all steps, in fp32, as the masters are that it works on."""
    parameters = [each.to(device, torch.float32) for each in _first(0)]
    means, squares = ([torch.zeros_like(each) for each in parameters] for _ in KEYS)
    for step in range(1, STEPS + 1):
        gradients = [each.to(device, torch.float32) for each in _first(step)]
        scale = None if factor is None else torch.tensor(factor, device=device)
        update(parameters, gradients, means, squares, step, **USED, weight_decay=decay, scale=scale)
    return parameters, means, squares


def _textbook(name: str, book: ModuleType, role: str, factor: float | None) -> Lists:
    """The same in fp64. The options that a call does not tell are the optimizer's own."""
    options = plugin_class(name).Options.model_validate({**USED, "weight_decay": max(DECAYS.values())}, strict=False)
    parameters = [each.float().double() for each in _first(0)]
    states: list[dict[str, Tensor]] = [{} for _ in parameters]
    for step in range(1, STEPS + 1):
        for place, gradient in enumerate(_first(step)):
            scaled = gradient.float().double() * (1.0 if factor is None else factor)
            parameters[place] = book.update(options, "it", role, parameters[place], scaled, states[place], 1.0)
    if any(key not in state for state in states for key in KEYS):
        raise NoReference(f"the textbook of '{name}' has no two moments: {sorted(states[0])}")
    means, squares = ([state[key] for state in states] for key in KEYS)
    return parameters, means, squares


def _flat(lists: Lists) -> list[Tensor]:
    return [each for values in lists for each in values]
