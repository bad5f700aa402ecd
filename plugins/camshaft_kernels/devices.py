"""The GPU that a launch goes to."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_AS_IT_IS: AbstractContextManager[None] = nullcontext()


def on_device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Make the GPU of ``tensor`` current inside of a ``with``.

    Triton launches on the current device and its stream, and so does what was written with Triton alone: given tensors
    of another GPU it fails, or is out of order with what made them. A run makes its GPU current once, so this costs one
    comparison; where a compiler traces the call it is left to it, which launches on the tensors' device anyway.
    """
    if torch.compiler.is_compiling() or not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _AS_IT_IS
    return torch.cuda.device(tensor.device)
