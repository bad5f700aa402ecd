"""What layers compiled by Inductor keep for backward, for ``camshaft plan``. Pure, and without torch.

Inductor cuts the joint graph of forward and backward where fewest bytes cross (``torch._functorch.partitioners``, after
He et al., https://dev-discuss.pytorch.org/t/467): of the decoder's layers, activation functions are made again from the
products that enter them, a norm's result is cast once for all products that take it, and the sum behind attention is
made again from the layer's input and the projection's result, which is as narrow as products are. Matrix products,
attention and what it takes are kept. Other plugins' kernels are opaque: what a kernel keeps, it keeps.

The first window runs uncompiled, and keeps what it would keep without this plugin.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from camshaft.models.stages import LLAMA

if TYPE_CHECKING:
    from camshaft.activations import Kept
    from camshaft.claims import PlanContext
    from camshaft.estimate import Sizes
    from camshaft_compile import Options

KERNELS = "kernels"
"""The plugin whose norms may be kernels that keep the sum that they make."""


def change(options: Options, context: PlanContext, sizes: Sizes, kept: tuple[Kept, ...]) -> Iterator[Kept]:
    """``kept`` with the layers compiled."""
    patterns = options.modules or [f"{LLAMA.layers}.*"]
    param = sizes.widths.param
    sums = KERNELS not in context.plugins
    cast: set[str] = set()
    for each in kept:
        size = each.bytes
        if _inside(each.module, patterns):
            size = _size(each, cast, (min(sizes.widths.compute, param), param), sums)
        yield replace(each, bytes=size, once=each.once + each.bytes - size)


def _size(each: Kept, cast: set[str], widths: tuple[int, int], sums: bool) -> int:
    """Bytes that stay of one tensor; ``cast``: norms whose results are cast already; ``widths``: of an element of a
    product and of the residual stream; ``sums``: whether the sum behind attention can be made again.
    """
    narrow, param = widths
    leaf = each.module.rpartition(".")[2]
    if each.name in ("silu", "normed"):
        return 0
    if each.name.startswith("output for "):
        if each.module in cast:
            return 0
        cast.add(each.module)
    if each.name == "hidden" and leaf in ("q_norm", "k_norm") and each.made == "norm":
        return each.bytes * narrow // max(param, 4)
    if each.name == "hidden" and leaf == "post_attention_layernorm" and each.made == "product" and sums:
        return each.bytes * narrow // param
    return each.bytes


def _inside(module: str, patterns: list[str]) -> bool:
    """Whether a pattern names ``module`` or one around it; ``*`` stands for one level."""
    parts = module.split(".")
    return any(
        len(levels) <= len(parts) and all(map(fnmatchcase, parts, levels))
        for levels in (pattern.split(".") for pattern in patterns)
    )
