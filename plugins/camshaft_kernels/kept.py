"""What fused operations keep for backward in place of torch's own, for ``camshaft plan``. Pure, and without torch.

Of ``auto`` it counts what the rules take: tables belong to the machine that trains.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from camshaft.activations import Kept
from camshaft_kernels import table
from camshaft_kernels.checks import Checks
from camshaft_kernels.chunks import chunk_size, chunk_tokens, row_elements
from camshaft_kernels.offers import OFFERS
from camshaft_kernels.registry import AUTO, own_form

if TYPE_CHECKING:
    from camshaft.estimate import Sizes

FUSED_LOSS = "linear_cross_entropy"
HEAD = "lm_head"
UNREPEATED = ("flash_attention",)
"""Providers of ``document_attention`` that take key and value heads as they are."""


def change(kept: tuple[Kept, ...], checks: Checks, sizes: Sizes) -> tuple[Kept, ...]:
    """``kept`` as it is with the expected implementations."""
    taken = {op: expected(op, wish, checks) for op, wish in checks.wishes.items()}
    changed = {op: provider for op, provider in taken.items() if provider != own_form(op)}
    found = [entry for each in kept for entry in _one(each, changed, sizes)]
    if FUSED_LOSS in changed:
        found += _gradients(kept, sizes, changed[FUSED_LOSS])
    return tuple(found)


def expected(op: str, wish: str, checks: Checks) -> str:
    """The provider that a run is expected to take: the named one, or by the rules the first that can be there."""
    if wish != AUTO:
        return wish
    device = "cpu" if checks.device == "cpu" else "cuda"
    rule = table.rules()[device].get(op)
    if op in checks.bars or rule is None:
        return own_form(op)
    here = (name for name in rule.order if checks.device == "any" or OFFERS[op][name].lack(device) is None)
    return next(here, own_form(op))


def _one(each: Kept, changed: dict[str, str], sizes: Sizes) -> Iterator[Kept]:
    """What is kept in place of one tensor."""
    leaf = each.module.rpartition(".")[2]
    if leaf == "mlp" and each.name == "silu" and "swiglu" in changed:
        return  # made again from the gate
    if FUSED_LOSS in changed and (each.module in ("loss", HEAD) or _enters_head(each)):
        return
    if leaf == "self_attn" and "document_attention" in changed:
        yield from _documents(each, changed["document_attention"], sizes)
        return
    if each.name == "log_softmax" and changed.get("cross_entropy") == "triton":
        # The logits as they came, in place of their softmax in fp32.
        yield replace(each, name="logits", made="logits", bytes=each.bytes * sizes.widths.compute // _wide(sizes))
        return
    yield each


def _enters_head(each: Kept) -> bool:
    """Whether it is the last norm's result, which the projection alone keeps."""
    return each.module == "model.norm" and each.name.startswith("output")


def _documents(each: Kept, provider: str, sizes: Sizes) -> Iterator[Kept]:
    if each.name == "mask":
        return
    if each.name == "out" and provider == "torch_segments":  # its backward needs each document's, the product all
        yield replace(each, name="out of each document", flops=0.0)
    name, repeated, _ = each.name.partition(" for each query head")
    if repeated and provider in UNREPEATED and sizes.config is not None:
        heads, groups = sizes.config.num_attention_heads, sizes.config.num_key_value_heads
        yield replace(each, name=name, bytes=each.bytes * groups // heads)
        return
    yield each


def _gradients(kept: tuple[Kept, ...], sizes: Sizes, provider: str) -> Iterator[Kept]:
    """Gradients that the forward of a fused loss makes, where the loss is made: in the dtype of what they are of, but
    Triton's in fp32 or wider.
    """
    loss = next((each for each in kept if each.module == "loss"), None)
    if loss is None or sizes.config is None:
        return
    width = _wide(sizes) if provider == "triton" else sizes.widths.param
    elements = sizes.config.vocab_size * sizes.config.hidden_size
    like = replace(loss, module=HEAD, made="loss", flops=0.0)
    trains = _trains(sizes)
    if trains:
        yield replace(like, name="gradient of the weight", bytes=elements * width)
    making = _making(sizes, sizes.config.vocab_size, sizes.config.hidden_size, provider, trains)
    yield replace(like, name="gradient of the hidden states", bytes=sizes.hidden * width, making=making)


def _making(sizes: Sizes, vocabulary: int, features: int, provider: str, trains: bool) -> int:
    """Bytes that are there while a fused loss runs, beside the gradients that it makes: one chunk of logits, the last
    norm's result, and what autocast narrows of it and of the weight; with torch's form, which adds up in fp32, the
    narrow weight's gradient in that.
    """
    param, wide = sizes.widths.param, _wide(sizes)
    compute = min(sizes.widths.compute, param)
    tokens, elements = sizes.hidden // features, vocabulary * features
    around = sizes.hidden * param + (elements * compute if compute < param else 0)
    if provider == "triton":
        narrowed = sizes.hidden * compute if compute < param else 0
        return around + narrowed + chunk_tokens(tokens, vocabulary, compute) * row_elements(vocabulary) * compute
    sums = elements * wide if trains and param < wide else 0
    width = 2 * wide + (compute if compute < wide else 0)  # logits, the same in fp32, and their softmax
    return around + sums + chunk_size(tokens, vocabulary, features) * vocabulary * width


def _trains(sizes: Sizes) -> bool:
    known = (*(sizes.parameters or ()), *sizes.borrowed)
    return any(each.trains for each in known if f"{HEAD}.weight" in (each.name, *each.tied))


def _wide(sizes: Sizes) -> int:
    return max(sizes.widths.param, 4)
