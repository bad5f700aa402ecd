"""AdamW by another implementation of its arithmetic, which multiplies gradients by a factor on the way: the clip
coefficient costs no pass of its own then.

torch's fused form could be given the factor too, but it divides by the inverse, in fp32: it is left alone, so that a
run without other kernels equals torch's own clipping and AdamW in every bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, optim

Update = Callable[..., None]
Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]
"""Parameters, gradients, first and second moments."""


class AdamW(optim.AdamW):
    """The same optimizer and state, its arithmetic done by ``update`` (an entry of ``world.ops.updates``).

    Its name is the same too, by which checkpoints tell whose state they hold: runs go on from one to the other.
    """

    scale: Tensor | None = None
    """Factor on the gradients of the next step, a scalar where they are; None is 1."""

    def __init__(self, groups: Any, update: Update, **hyperparameters: Any) -> None:
        super().__init__(groups, **hyperparameters)
        self._update = update

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; ``closure`` is not supported."""
        assert closure is None
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for step, lists in self._lists(group["params"]).items():
                self._update(
                    *lists,
                    step,
                    lr=float(group["lr"]),
                    betas=(beta1, beta2),
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    scale=self.scale,
                )

    def _lists(self, parameters: list[Tensor]) -> dict[int, Lists]:
        """Tensors that have gradients, by the number of this step of theirs, from 1."""
        found: dict[int, Lists] = {}
        for parameter in parameters:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["step"] += 1
            members = found.setdefault(int(state["step"]), ([], [], [], []))
            for member, tensor in zip(
                members, (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]), strict=True
            ):
                member.append(tensor)
        return found
