"""What a forward keeps for its backward, as ``camshaft plan`` counts it. Pure, made without torch.

Terms are those of Korthikanti et al. (arXiv:2205.05198), section 4, for the decoder that the core builds. Each tensor
that autograd keeps is one ``Kept``; plugins change the table in the hook ``activations``: what they make again, divide
over ranks, never make at all, or hold of more than one microbatch at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

Made = Literal["input", "norm", "product", "rotation", "attention", "activation", "logits", "loss", "weight"]
"""What makes a tensor: the residual stream that enters a layer, a norm, a matrix product (the residual stream behind
attention too), the rotation of q and k, scores and their sums, an activation function, the output projection, the
cross-entropy; ``weight``: a weight's copy in the dtype of autocast, which a forward makes and its backward needs."""


@dataclass(frozen=True, slots=True)
class Kept:
    """One tensor that is kept from the forward of a microbatch to its backward. A table has them in forward order."""

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
    again: int = 0
    """Bytes that are there only while the backward of its layer runs: made again, or fetched."""
    making: int = 0
    """Bytes that are there only while its forward makes it, beside itself and what came before."""
    once: int = 0
    """More bytes of it in the first window of a process, when optimizers hold no values yet."""

    @property
    def held(self) -> int:
        """Bytes at the fullest moment."""
        return self.bytes * self.microbatches


def by_kind(kept: Iterable[Kept]) -> dict[Made, int]:
    """Bytes at the fullest moment by what makes them, in the order of ``Made``; kinds of which nothing is kept are left
    out."""
    sums: dict[Made, int] = dict.fromkeys(get_args(Made), 0)
    for each in kept:
        sums[each.made] += each.held
    return {made: size for made, size in sums.items() if size}
