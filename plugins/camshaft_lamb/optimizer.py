"""LAMB over parts: moments element by element, trust ratios by parameter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from camshaft.models.groups import decay_groups
from camshaft.parts import Part, Parts
from camshaft.sums import ParameterSums

if TYPE_CHECKING:
    from camshaft_lamb import Options


def may_be_fused(parts: Parts, options: Options) -> bool:
    """Whether LAMB's arithmetic may be another implementation's: that of You et al. for whole tensors, without a limit,
    with a ratio for exactly those that decay.
    """
    alone = all(channel is None or channel.size == 1 for channel in (parts.channel, parts.holders))
    plain = options.max_ratio is None and options.exempt_vectors and options.weight_decay > 0
    return plain and alone and all(part.whole and not isinstance(part.tensor, DTensor) for part in parts)


class Lamb(Optimizer):
    """You et al., arXiv:1904.00962, algorithm 2, with bias correction.

    State: ``exp_avg`` and ``exp_avg_sq``, shaped like the tensor, and ``step``, an fp32 scalar on the CPU. ``names``
    are those of the model's parameters, in one order on all ranks. Construction and steps are collective.
    """

    def __init__(
        self,
        parts: Parts,
        names: Sequence[str],
        device: torch.device,
        options: Options,
        update: Callable[..., None] | None = None,
    ) -> None:
        groups = decay_groups(parts, options.weight_decay)
        roles = {id(part.tensor): part.role for part in parts}
        for group in groups:
            vectors = any(roles[id(tensor)] in ("norm", "bias") for tensor in group["params"])
            group["adapt"] = not (vectors and options.exempt_vectors)
        beta1, beta2 = options.betas
        super().__init__(groups, {"lr": options.lr, "betas": (beta1, beta2), "eps": options.eps})
        self._parts, self._max_ratio = parts, options.max_ratio
        self._sums = ParameterSums(parts, names, device)
        self._update = update

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # the engine gives no closure
        """Update every part that has a gradient. Ranks that have none take part in the sums all the same."""
        if self._update is not None:
            self._fused(self._update)
            return
        groups = {id(tensor): group for group in self.param_groups for tensor in group["params"]}
        updates: dict[Part, Tensor] = {}
        for group in self.param_groups:
            live = [part for part in self._parts if _has_gradient(part) and groups[id(part.tensor)] is group]
            if live:
                updates |= zip(live, self._directions([part.tensor for part in live], group), strict=True)
        adapted = {part: update for part, update in updates.items() if groups[id(part.tensor)]["adapt"]}
        ratios = self._ratios(adapted)
        scaled = [flat for part, update in adapted.items() for flat in _by_piece(part, update)]
        if scaled:
            columns = self._sums.columns(adapted)
            torch._foreach_mul_(scaled, ratios[columns].to(scaled[0].dtype).unbind())
        for group in self.param_groups:
            chosen = [(part.tensor, update) for part, update in updates.items() if groups[id(part.tensor)] is group]
            if chosen:
                tensors, directions = zip(*chosen, strict=True)
                torch._foreach_add_(tensors, directions, alpha=-group["lr"])

    def _fused(self, update: Callable[..., None]) -> None:
        """One call for each group and number of step."""
        for group in self.param_groups:
            by_step: dict[int, list[Tensor]] = {}
            for tensor in group["params"]:
                if tensor.grad is not None:
                    state = self._state_of(tensor)
                    state["step"] += 1
                    by_step.setdefault(int(state["step"]), []).append(tensor)
            options = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
            for step, tensors in by_step.items():
                moments = [[self.state[tensor][key] for tensor in tensors] for key in ("exp_avg", "exp_avg_sq")]
                update(tensors, [tensor.grad for tensor in tensors], *moments, step, **options, scale=None)

    def _ratios(self, updates: dict[Part, Tensor]) -> Tensor:
        """Trust ratio of each parameter, fp64; 1 where either norm is 0."""
        weights, lengths = self._sums({part: part.tensor for part in updates}, updates)
        ratios = (weights / lengths).sqrt()
        usable = (weights > 0) & (lengths > 0)
        ratios = torch.where(usable, ratios, torch.ones_like(ratios))
        return ratios if self._max_ratio is None else ratios.clamp(max=self._max_ratio)

    def _directions(self, tensors: list[Any], group: dict[str, Any]) -> Sequence[Tensor]:
        """Update the moments; return Adam's step, with the decay added, for each tensor."""
        states = [self._state_of(tensor) for tensor in tensors]
        gradients = [tensor.grad for tensor in tensors]
        means, squares = [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]
        beta1, beta2 = group["betas"]
        torch._foreach_add_([state["step"] for state in states], 1)
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2)
        steps = [state["step"].item() for state in states]  # on the CPU: no wait for the device
        directions = torch._foreach_sqrt(squares)
        torch._foreach_div_(directions, [(1 - beta2**step) ** 0.5 for step in steps])
        torch._foreach_add_(directions, group["eps"])
        torch._foreach_reciprocal_(directions)
        torch._foreach_mul_(directions, means)
        torch._foreach_div_(directions, [1 - beta1**step for step in steps])
        if group["weight_decay"]:
            torch._foreach_add_(directions, tensors, alpha=group["weight_decay"])
        return directions

    def _state_of(self, tensor: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[tensor]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(tensor), torch.zeros_like(tensor)
        return state


def _by_piece(part: Part, values: Tensor) -> list[Tensor]:
    """Views of ``values``, which may have any strides where the part is one whole parameter."""
    return [values] if part.whole else [flat for _, flat in part.slices(values)]


def _has_gradient(part: Part) -> bool:
    return part.tensor.grad is not None
