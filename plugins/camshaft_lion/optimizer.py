"""Lion over any tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.optim import Optimizer

RUN = 2**24
"""Elements that are updated together: their directions are there at once, those of all would take as much memory as
all averages."""


class Lion(Optimizer):
    """Chen et al., arXiv:2302.06675, algorithm 2. State: ``exp_avg``, shaped like the tensor."""

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # the engine gives no closure
        """Update every tensor that has a gradient."""
        for group in self.param_groups:
            tensors = [tensor for tensor in group["params"] if tensor.grad is not None]
            for run in _runs(tensors):
                self._update(run, group)

    def _update(self, tensors: list[torch.Tensor], group: dict[str, Any]) -> None:
        gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
        for tensor in tensors:
            if not self.state[tensor]:
                self.state[tensor]["exp_avg"] = torch.zeros_like(tensor)
        averages = [self.state[tensor]["exp_avg"] for tensor in tensors]
        beta1, beta2 = group["betas"]
        direction = torch._foreach_lerp(gradients, averages, beta1)
        torch._foreach_sign_(direction)
        torch._foreach_mul_(tensors, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(tensors, direction, alpha=-group["lr"])
        torch._foreach_lerp_(averages, gradients, 1 - beta2)


def _runs(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Tensors in their order, in runs of at most ``RUN`` elements, or of one tensor."""
    run: list[torch.Tensor] = []
    left = RUN
    for tensor in tensors:
        if run and tensor.numel() > left:
            yield run
            run, left = [], RUN
        run.append(tensor)
        left -= tensor.numel()
    if run:
        yield run
