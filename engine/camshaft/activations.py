"""What a forward keeps for its backward, as ``camshaft plan`` counts it. Pure, made without torch.

Terms are those of Korthikanti et al. (arXiv:2205.05198), section 4, for the decoder that the core builds. Each tensor
that autograd keeps is one ``Kept``; plugins change the table in the hook ``activations``: what they make again, divide
over ranks, never make at all, or hold of more than one microbatch at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Made = Literal["input", "norm", "product", "rotation", "attention", "activation", "logits", "loss"]
"""What makes a tensor: the residual stream that enters a layer, a norm, a matrix product, the rotation of q and k,
scores and their sums, an activation function, the output projection, the cross-entropy."""


@dataclass(frozen=True, slots=True)
class Kept:
    """One tensor that is kept from the forward of a microbatch to its backward."""

    module: str
    """Name of the module that makes it (``model.layers.3.mlp``), which globs of a recipe match."""
    name: str
    """What it is in that module (``gate``)."""
    made: Made
    bytes: int
    """Of one microbatch, on this rank."""
    flops: float = 0.0
    """Floating-point operations to make it again."""
    microbatches: int = 1
    """Of how many microbatches it is held at the fullest moment."""
    stage: int = 0
    """Pipeline stage of the module."""

    @property
    def held(self) -> int:
        """Bytes at the fullest moment."""
        return self.bytes * self.microbatches
