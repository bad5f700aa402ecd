"""Adafactor over parts: second moments element by element, sizes by parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from camshaft.models.groups import decay_groups
from camshaft.parts import Part, Parts
from camshaft.sums import ParameterSums

if TYPE_CHECKING:
    from camshaft_adafactor import Options


class Adafactor(Optimizer):
    """Shazeer & Stern, arXiv:1804.04235, algorithm 6 with a whole second moment and no factors.

    State: ``exp_avg_sq``, shaped like the tensor, and ``step``, an fp32 scalar on the CPU. ``names`` are those of the
    model's parameters, in one order on all ranks. Construction and steps are collective where sizes are needed.
    """

    def __init__(self, parts: Parts, names: Sequence[str], device: torch.device, options: Options) -> None:
        groups = decay_groups(parts, options.weight_decay, decay_embeddings=options.decay_embeddings)
        super().__init__(groups, {"lr": options.lr})
        self._parts, self._options = parts, options
        sized = options.clip_threshold is not None or options.scale_by_weights
        self._sums = ParameterSums(parts, names, device) if sized else None

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # the engine gives no closure
        """Update every part that has a gradient. Ranks that have none take part in the sums all the same."""
        live = [part for part in self._parts if part.tensor.grad is not None]
        updates = dict(zip(live, self._directions(live), strict=True))
        self._scale(updates)
        for group in self.param_groups:
            members = {id(tensor) for tensor in group["params"]}
            chosen = [part for part in live if id(part.tensor) in members]
            if chosen:
                tensors: list[Any] = [part.tensor for part in chosen]
                torch._foreach_mul_(tensors, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(tensors, [updates[part] for part in chosen], alpha=-group["lr"])

    def _directions(self, parts: Sequence[Part]) -> Sequence[Tensor]:
        """Update the second moments; return each gradient over its root."""
        if not parts:
            return ()
        states = [self._state_of(part.tensor) for part in parts]
        gradients: list[Any] = [part.tensor.grad for part in parts]
        squares = [state["exp_avg_sq"] for state in states]
        torch._foreach_add_([state["step"] for state in states], 1)
        kept = [1 - state["step"].item() ** -self._options.decay_exponent for state in states]  # no wait: on the CPU
        fresh = torch._foreach_mul(gradients, gradients)
        torch._foreach_add_(fresh, self._options.eps)
        torch._foreach_mul_(squares, kept)
        torch._foreach_mul_(fresh, [1 - each for each in kept])
        torch._foreach_add_(squares, fresh)
        torch._foreach_copy_(fresh, squares)
        torch._foreach_sqrt_(fresh)
        torch._foreach_reciprocal_(fresh)
        torch._foreach_mul_(fresh, gradients)
        return fresh

    def _scale(self, updates: dict[Part, Tensor]) -> None:
        """Bound the root mean square of each parameter's update, and make it a part of the weights'."""
        if self._sums is None:
            return
        updated, weights = self._sums(updates, {part: part.tensor for part in updates})
        columns = self._sums.columns(updates)
        if not len(columns):
            return
        sizes = self._sums.sizes[columns]
        factors = torch.ones_like(sizes)
        if self._options.clip_threshold is not None:
            factors /= ((updated[columns] / sizes).sqrt() / self._options.clip_threshold).clamp(min=1.0)
        if self._options.scale_by_weights:
            factors *= (weights[columns] / sizes).sqrt().clamp(min=self._options.least_scale)
        flats = [flat for part, update in updates.items() for flat in _by_piece(part, update)]
        torch._foreach_mul_(flats, factors.to(flats[0].dtype).unbind())

    def _state_of(self, tensor: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[tensor]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(tensor)
        return state


def _by_piece(part: Part, values: Tensor) -> list[Tensor]:
    """Views of ``values``, which may have any strides where the part is one whole parameter."""
    return [values] if part.whole else [flat for _, flat in part.slices(values)]
