"""The part that needs torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

KEY = "ema.weights"


@torch.no_grad()
def average(optimizer: Optimizer, tensors: Sequence[Tensor], decay: float) -> None:
    """Move each tensor's mean towards it. No copy to the host.

    A tensor that the optimizer has no state for, while it has some for others, was never updated: it gets none, since
    optimizers take any state for their own and would not make theirs.
    """
    stateless = not any(optimizer.state.get(tensor) for tensor in tensors)
    means, values = [], []
    for tensor in tensors:
        state = optimizer.state.get(tensor, {})
        if KEY in state:
            means.append(state[KEY])
            values.append(tensor)
        elif state or stateless:
            optimizer.state[tensor][KEY] = tensor.detach().clone()
    if means:
        torch._foreach_lerp_(means, values, 1 - decay)
