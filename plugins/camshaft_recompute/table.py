"""What a forward keeps under recomputation, from the table that ``camshaft plan`` has without it. No torch.

What a module would keep is made again, but for results of products in mode `selective`; its inputs stay. In mode
`offload` it comes back, for two layers at a time. The table is that of the built-in decoder, so regions are its layers,
or attention and MLP in them. A result of a product that a collective takes (rows divided over ranks) cannot be kept.
Which results a budget will choose is known from times alone; that it is used up, by as many bytes of each tensor, is
counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

from camshaft.activations import Kept
from camshaft.models.stages import LLAMA
from camshaft_recompute.patterns import chosen, inside

if TYPE_CHECKING:
    from camshaft.claims import PlanContext
    from camshaft.estimate import Sizes
    from camshaft_recompute.options import Options

USERS = {"input_layernorm": "self_attn", "post_attention_layernorm": "mlp"}
"""Whose casts of a norm's result stand under the norm."""
SAVED = {"attention": ("attention",), "activations": ("activation",), "norms": ("norm",)}
"""Kinds of `save`, beside products, to what the table calls them."""


def changed(options: Options, context: PlanContext, sizes: Sizes, kept: tuple[Kept, ...]) -> tuple[Kept, ...]:
    """``kept`` as the modules of ``options`` leave it: bytes that are gone, and those that come back in ``again``."""
    names = dict.fromkeys(".".join(parts[:end]) for parts in _parts(kept) for end in range(1, len(parts) + 1))
    regions = chosen(names, options.modules or [f"{LLAMA.layers}.*"], options.every, options.layers)
    table = _Table(options, context, sizes)
    found: list[Kept] = []
    pending: dict[str, list[Kept]] = {region: [] for region in regions}
    for each in kept:
        region = next((region for region in regions if inside(_user(each), region)), None)
        if region is None:
            found.append(each)
            continue
        if not pending[region]:
            found += table.inputs(region, each)
        pending[region].append(each)
        found += table.left(region, each)
    if options.mode == "offload":
        found += _ahead([rows for rows in pending.values() if rows])
    masks = {each.stage: each for several in pending.values() for each in several if each.name == "mask"}
    if options.mode in ("full", "selective"):
        found += [table.mask(each) for each in masks.values()]
    if options.budget is not None:
        inner = [each for each in found if any(inside(_user(each), region) for region in regions)]
        share = _share(options.budget, inner)
        found = [_partly(each, share) for each in found]
    return tuple(found)


def _ahead(regions: Sequence[Sequence[Kept]]) -> Iterator[Kept]:
    """What comes back for the layer before while the backward of a layer runs."""
    for before, rows in pairwise(regions):
        if before[0].module.split(".")[:3] != rows[0].module.split(".")[:3]:
            size = sum(each.bytes for each in before)
            yield replace(rows[0], name="fetched ahead", bytes=0, flops=0.0, again=size, once=0)


def _share(budget: int, inner: Sequence[Kept]) -> float:
    """Part of what the chosen modules could make again that a budget of so many bytes keeps, beside their inputs."""
    again = sum(each.again for each in inner)
    left = budget - sum(each.bytes for each in inner)
    return min(max(left, 0) / again, 1.0) if again else 0.0


def _partly(each: Kept, share: float) -> Kept:
    """``each`` with that part of what would be made again kept."""
    kept = round(each.again * share)
    return replace(each, bytes=each.bytes + kept, again=each.again - kept)


def _parts(kept: Sequence[Kept]) -> Iterator[list[str]]:
    for each in kept:
        yield _user(each).split(".")


def _user(each: Kept) -> str:
    """The module in whose forward autograd keeps it: casts of a norm's result are their users'."""
    parent, _, leaf = each.module.rpartition(".")
    if leaf in USERS and each.name.startswith("output for"):
        return f"{parent}.{USERS[leaf]}"
    return each.module


class _Table:
    def __init__(self, options: Options, context: PlanContext, sizes: Sizes) -> None:
        self._mode, self._kinds = options.mode, options.kinds if options.budget is None else ()
        assert sizes.config is not None
        self._config, self._sizes = sizes.config, sizes
        self._param = sizes.widths.param
        self._compute = min(sizes.widths.compute, sizes.widths.param)
        self._length = context.recipe.data.sequence_length
        self._divided = {
            each.name.rpartition(".")[0] for each in sizes.parameters or () if each.shape != each.whole_shape
        }

    def inputs(self, region: str, first: Kept) -> Iterator[Kept]:
        """What is held of a region's inputs and stands in no other row; ``first``: its first row."""
        if self._mode == "offload":
            return
        leaf = region.rpartition(".")[2]
        size = self._sizes.hidden * self._param
        if leaf in ("self_attn", "mlp"):
            if self._compute < self._param:  # the norm's result, of which only casts were kept
                yield replace(first, name="input", made="norm", bytes=size, flops=0.0)
        elif leaf.isdecimal():
            yield replace(first, name="input", made="input", bytes=size, flops=0.0)

    def left(self, region: str, each: Kept) -> Iterator[Kept]:
        """What stays of row ``each``: nothing but what is needed again, or results that are kept."""
        if self._mode == "selective":
            yield from self._results(each)
            if self._stays(each):
                yield each
                return
        if each.made == "input" and region.rpartition(".")[2].isdecimal() and self._mode != "offload":
            return  # the region's own input, which has its row
        yield replace(each, bytes=0, again=each.bytes, once=0)

    def _stays(self, each: Kept) -> bool:
        residual = each.name == "hidden"  # of a norm: the sum of a product and what goes past it
        if each.made == "product" and not residual:
            return "products" in self._kinds and each.name in ("gate", "up", "v")
        return any(each.made in SAVED.get(kind, ()) for kind in self._kinds) and each.name != "mask"

    def _results(self, each: Kept) -> Iterator[Kept]:
        """Results of products that autograd does not keep as they are: of q and k before they are turned, and of the
        projection behind attention.
        """
        leaf = each.module.rpartition(".")[2]
        if "products" not in self._kinds or leaf != "self_attn":
            return
        hidden = self._config.hidden_size
        if each.name in ("q", "k"):  # 6 operations an element turn it
            elements = each.flops / 6
            name = f"{each.name} before rotation"
            size = int(elements * self._compute)
            yield replace(each, name=name, made="product", bytes=size, flops=2 * hidden * elements)
        elif each.name == "out" and f"{each.module}.o_proj" not in self._divided:
            tokens = self._sizes.hidden // hidden
            width = each.bytes // (tokens * self._compute)
            yield replace(
                each,
                name="o",
                made="product",
                bytes=self._sizes.hidden * self._compute,
                flops=2.0 * tokens * hidden * width,
            )

    def mask(self, each: Kept) -> Kept:
        """Of documents, one byte an element, which all layers of a stage share."""
        return replace(each, name="document mask", bytes=each.bytes // self._compute, flops=0.0)
