"""Momentum of parameters that get their first gradient later than others."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer


def fill_momentum(optimizer: Optimizer, _: Any, __: Any) -> None:
    """Before a step: zeros where a parameter has a gradient and no momentum yet, and others have theirs.

    torch's fused step takes either none or all of them. From zeros the first momentum is the gradient, which is what it
    is otherwise.
    """
    for group in optimizer.param_groups:
        used = [parameter for parameter in group["params"] if parameter.grad is not None]
        late = [each for each in used if optimizer.state.get(each, {}).get("momentum_buffer") is None]
        if len(late) == len(used):
            continue
        for parameter in late:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
