"""What fp8 layers keep for backward, for ``camshaft plan``. Pure, and without torch.

A layer keeps its input in bf16 and makes 8 bits of it and of its weight again in backward, so no copy of the weight is
kept. Compiled, with one scale for a whole tensor, the 8 bits themselves are kept, of both: Inductor does not read a
tensor again to make less of it. With a scale for each row the products of backward need other 8 bits than those of the
forward: then nothing of both is kept, and what the input is made of is read again. A weight's gradient in bf16 needs
the input in bf16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from camshaft_precision import choice

if TYPE_CHECKING:
    from camshaft.activations import Kept
    from camshaft.claims import PlanContext
    from camshaft_precision import Fp8

COMPILE = "compile"
"""The plugin that compiles layers."""
USERS = {"input_layernorm": ("self_attn", "q_proj"), "post_attention_layernorm": ("mlp", "gate_proj")}
"""Norms, and where their results go."""


def change(options: Fp8, context: PlanContext, kept: tuple[Kept, ...]) -> Iterator[Kept]:
    """``kept`` with those linear layers in fp8 that ``options`` choose."""
    assert context.config is not None
    layers = frozenset(choice.chosen(context.config, options.keep))
    compiled, rowwise = COMPILE in context.plugins, options.recipe == "rowwise"
    eight = compiled and not rowwise
    inputs = compiled and options.weight_gradient == "fp8"
    for each in kept:
        if each.name == "weight" and each.module in layers:
            if eight:
                yield replace(each, bytes=each.bytes // 2, once=-(each.bytes // 2))
        elif inputs and _taker(each) in layers:
            yield from _narrowed(each, 0 if rowwise else each.bytes // 2)
        else:
            yield each


def _narrowed(each: Kept, size: int) -> Iterator[Kept]:
    """A layer's input, of which ``size`` bytes are kept; but what attention makes, attention keeps too."""
    if each.name != "out":
        yield replace(each, bytes=size, once=each.once + each.bytes - size)
        return
    yield each
    if size:
        yield replace(each, name="out in 8 bits", bytes=size, once=-size, flops=0.0)


def _taker(each: Kept) -> str:
    """The linear layer that takes a tensor alone, or the first of those that do."""
    parent, _, leaf = each.module.rpartition(".")
    if leaf in USERS and each.name.startswith("output"):
        block, first = USERS[leaf]
        return f"{parent}.{block}.{each.name.partition(' for ')[2] or first}"
    if leaf == "mlp" and each.name == "activated":
        return f"{each.module}.down_proj"
    return f"{each.module}.o_proj" if leaf == "self_attn" and each.name == "out" else ""
