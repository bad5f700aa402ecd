"""What is compared of a step: raw gradients, norm, weights, optimizer state, loss, in this order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from camshaft.meter import global_sums
from camshaft.plugin import Plugin, hookimpl
from camshaft.state import State


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step. Tensors are copies on the CPU; a parameter without a gradient has None."""

    step: int
    gradients: Mapping[str, Tensor | None]
    norm: float | None
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    loss: float
    lr: float


class Probe(Plugin):
    """Records every step of a run. Must come last in the recipe's order, to see gradients after every reduction."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[StepRecord] = []
        self._gradients: dict[str, Tensor | None] = {}

    @hookimpl
    def reduce(self, state: State) -> None:
        """Copy the gradients before clipping."""
        self._gradients = gradients(state.model)

    @hookimpl
    def post_step(self, state: State) -> None:
        """Copy what the step left."""
        assert state.loss is not None and state.window is not None
        loss, weight = global_sums(state.world, state.loss, float(state.window.weight))
        self.records.append(
            StepRecord(
                step=state.step,
                gradients=self._gradients,
                norm=None if state.grad_norm is None else float(state.grad_norm),
                weights=weights(state.model),
                optimizer=optimizer_state(state.model, state.optimizer),
                loss=loss / max(weight, 1.0),
                lr=state.lr,
            )
        )


def gradients(model: Module) -> dict[str, Tensor | None]:
    """Copies of all gradients by name."""
    return {name: None if p.grad is None else p.grad.detach().clone().cpu() for name, p in model.named_parameters()}


def weights(model: Module) -> dict[str, Tensor]:
    """Copies of all parameters by name."""
    return {name: parameter.detach().clone().cpu() for name, parameter in model.named_parameters()}


def optimizer_state(model: Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Copies of the optimizer's tensors as ``<parameter>/<key>``."""
    return {
        f"{name}/{key}": torch.as_tensor(value).detach().clone().cpu()
        for name, parameter in model.named_parameters()
        for key, value in dict[str, Any](optimizer.state.get(parameter, {})).items()
        if value is not None
    }


def distance(one: Tensor, other: Tensor) -> float:
    """Relative L2 distance; 0 for two zeros, infinite for unequal shapes."""
    if one.shape != other.shape:
        return float("inf")
    wide_one, wide_other = one.double(), other.double()
    scale = float(wide_other.norm())
    gap = float((wide_one - wide_other).norm())
    return gap / scale if scale else gap
