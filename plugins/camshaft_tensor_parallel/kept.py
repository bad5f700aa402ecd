"""What a rank keeps of a microbatch where products are divided: Korthikanti et al. (arXiv:2205.05198), section 4.2. No
torch.

Inside of regions tensors are as wide as the rank's rows of the matrices that make them. What enters a region is whole,
one tensor for all products in it, also under autocast. Between regions it is whole too, or with sequence parallel
ceil(T / N) of T tokens. Tables and loss are divided by vocabulary, and keep a few numbers a token more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING

from camshaft.recipe.checks import micro_batch_size
from camshaft_tensor_parallel.shapes import style_plan

if TYPE_CHECKING:
    from camshaft.activations import Kept
    from camshaft.claims import PlanContext
    from camshaft.estimate import Sizes
    from camshaft_tensor_parallel import Options
    from camshaft_tensor_parallel.styles import StylePlan

Shares = Mapping[str, Fraction]
"""Module to the part of its matrix that the rank has."""

NORMS = ("input_layernorm", "post_attention_layernorm", "norm")
"""Norms between regions, whose results enter one."""


def divided(options: Options, context: PlanContext, sizes: Sizes, kept: tuple[Kept, ...]) -> tuple[Kept, ...]:
    """``kept`` as the rank has it: its stretch of features, heads, vocabulary and, with sequence parallel, tokens."""
    degree, plan = context.mesh["tp"].degree, style_plan(options, context)
    if degree == 1:
        return kept
    tokens = micro_batch_size(context.recipe) * context.recipe.data.sequence_length
    stretch = -(-tokens // degree)
    between = Fraction(stretch, tokens) if options.sequence_parallel else Fraction(1)
    shares = _shares(sizes)
    found: list[Kept] = []
    for each in kept:
        parent, _, leaf = each.module.rpartition(".")
        if leaf in NORMS and each.name.startswith("output"):
            # With tokens divided, the gathered ones have the padding of the last ranks.
            found += _entering(each, between * degree if options.sequence_parallel else between)
        elif leaf in NORMS:
            found.append(_times(each, between))
        elif each.module == "loss":
            found += _loss(each, plan, tokens, shares.get("lm_head", Fraction(1)))
        elif each.name == "tokens" and shares.get(each.module, 1) != 1:
            found += [each, replace(each, name="tokens of other ranks", bytes=tokens)]
        else:
            found.append(_times(each, _share(each, parent, leaf, shares)))
    return tuple(found)


def _times(each: Kept, share: Fraction) -> Kept:
    return replace(each, bytes=int(each.bytes * share), flops=float(each.flops * share), once=int(each.once * share))


def _shares(sizes: Sizes) -> Shares:
    found: dict[str, Fraction] = {}
    for each in (*(sizes.parameters or ()), *sizes.borrowed):
        for name in (each.name, *each.tied):
            module, _, leaf = name.rpartition(".")
            if leaf == "weight":
                whole = each.whole_shape
                found[module] = Fraction(each.shape[0], whole[0]) * Fraction(each.shape[-1], whole[-1])
                if len(whole) == 1:
                    found[module] = Fraction(each.shape[0], whole[0])
    return found


def _entering(each: Kept, share: Fraction) -> Iterator[Kept]:
    """The first of several casts stands for all: a region casts what enters it once."""
    _, apart, user = each.name.partition(" for ")
    if not apart or user in ("q_proj", "gate_proj", "lm_head"):
        yield replace(_times(each, share), name="output")


def _loss(each: Kept, plan: StylePlan, tokens: int, share: Fraction) -> Iterator[Kept]:
    style = plan.style("loss")
    if style is None or style.kind != "loss" or share == 1:
        yield each
    elif each.name == "log_softmax":
        yield replace(_times(each, share), name="softmax")
    elif each.name == "labels":
        yield replace(each, name="labels and which ranks have them", bytes=each.bytes + 2 * tokens)


def _share(each: Kept, parent: str, leaf: str, shares: Shares) -> Fraction:
    """Part of a tensor inside of a layer: that of the matrix that made it, or whose cast it is."""
    module = each.module
    if each.name == "weight":
        return shares.get(module, Fraction(1))
    if leaf in ("q_norm", "k_norm"):
        return shares.get(f"{parent}.{leaf[0]}_proj", Fraction(1))
    if leaf == "mlp":
        return shares.get(f"{module}.gate_proj", Fraction(1))
    if leaf != "self_attn" or each.name == "mask":
        return Fraction(1)
    made = "k_proj" if each.name in ("k", "v") else "q_proj"
    return shares.get(f"{module}.{made}", Fraction(1))
