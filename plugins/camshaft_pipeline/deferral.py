"""Split backward (Qi et al., arXiv:2401.10241): I makes gradients of inputs, W those of weights.

A linear layer's weight product is put off: in I its input and the gradient of its output are noted, in W they are
multiplied, and the product enters autograd at the weight, so that every hook on the weight runs as in an ordinary
backward. An embedding's rows are added in W likewise. Gradients of other parameters (norms, modules with a forward of
their own) come out of the graph in I, are kept, and enter at their parameters in W. The graph itself is gone after I:
until W only these pairs and small gradients are held.

Layers are watched where their computation is still torch's own; what another plugin put in its place is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge
from torch.nn import Embedding, Linear, Module

Leaves = tuple[Tensor, ...]
Gradients = tuple[Tensor | None, ...]
Place = tuple[int, int]
"""(microbatch, stage)."""


class Product(NamedTuple):
    """Gradients that W has to make: ``compute`` returns one for each of ``leaves``."""

    leaves: Leaves
    compute: Callable[[], tuple[Tensor, ...]]


class Kept(NamedTuple):
    """What is held of a microbatch in a stage from I to W."""

    products: list[Product]
    others: list[tuple[Tensor, Tensor]]
    """(parameter, its gradient)."""


class Deferral:
    """Splits the backward of this rank's stages. ``leaves``: stage to everything in it that trains."""

    def __init__(self, leaves: Mapping[int, Iterable[Tensor]], device: torch.device) -> None:
        self._leaves = {stage: tuple(each) for stage, each in leaves.items()}
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        self._one = torch.ones((), device=device)
        self._products: list[Product] | None = None
        self._kept: dict[Place, Kept] = {}
        self._watched: list[Module] = []

    def watch(self, model: Module, at_once: Iterable[Module] = ()) -> None:
        """Put off the weight products of ``model``'s linear layers and embeddings, but for those of ``at_once``."""
        left = set(at_once)
        for module in model.modules():
            if "forward" in vars(module) or module in left:
                continue
            if isinstance(module, Linear) and type(module).forward is Linear.forward:
                module.forward = self._linear(module)  # type: ignore[method-assign,assignment]
            elif isinstance(module, Embedding) and type(module).forward is Embedding.forward and _plain(module):
                module.forward = self._embedding(module)  # type: ignore[method-assign,assignment]
            else:
                continue
            self._watched.append(module)

    def close(self) -> None:
        """Give the modules their forwards back."""
        for module in self._watched:
            vars(module).pop("forward", None)
        self._watched = []

    def inputs(self, place: Place, edge: GradientEdge, gradient: Tensor | None, inputs: Sequence[Tensor]) -> Gradients:
        """Run I and return the gradients of ``inputs``. No parameter's gradient changes, and no hook on one runs."""
        leaves = self._leaves[place[1]]
        self._products = []
        try:
            found: Gradients = torch.autograd.grad(
                [edge],
                [self._anchor, *leaves, *inputs],
                [gradient],
                allow_unused=True,
            )
            behind = 1 + len(leaves)
            others = [(leaf, each) for leaf, each in zip(leaves, found[1:behind], strict=True) if each is not None]
            self._kept[place] = Kept(self._products, others)
        finally:
            self._products = None
        return found[behind:]

    def weights(self, place: Place) -> None:
        """Run W: every parameter of the stage that got a gradient gets it now, once."""
        kept = self._kept.pop(place, None)
        if kept is None:
            return
        roots: list[Tensor] = []
        gradients: list[Tensor] = []
        # Nodes made last run first: products run, and go, in the order in which I met them.
        while kept.products:
            product = kept.products.pop()
            roots.append(_Root.apply(product, self._one, *product.leaves))  # type: ignore[no-untyped-call]
            gradients.append(self._one)
            del product
        for leaf, gradient in kept.others:
            roots.append(leaf)
            gradients.append(gradient)
        kept.others.clear()
        if roots:
            torch.autograd.backward(roots, gradients)

    def add(self, leaves: Leaves, compute: Callable[[], tuple[Tensor, ...]]) -> bool:
        """Put ``compute`` off until W; False where no I is under way: then it is to be done at once."""
        if self._products is None or not leaves:
            return False
        self._products.append(Product(leaves, compute))
        return True

    def _linear(self, module: Linear) -> Callable[[Tensor], Tensor]:
        def forward(source: Tensor) -> Tensor:
            weight, bias = module.weight, module.bias
            if not torch.is_grad_enabled() or not (weight.requires_grad or _trains(bias)):
                return F.linear(source, weight, bias)
            made: Tensor = _Linear.apply(source, weight, bias, self._anchor, self)  # type: ignore[no-untyped-call]
            return made

        return forward

    def _embedding(self, module: Embedding) -> Callable[[Tensor], Tensor]:
        def forward(indices: Tensor) -> Tensor:
            weight = module.weight
            if not torch.is_grad_enabled() or not weight.requires_grad:
                return F.embedding(indices, weight, module.padding_idx)
            made: Tensor = _Lookup.apply(indices, weight, module.padding_idx, self)  # type: ignore[no-untyped-call]
            return made

        return forward


def _plain(module: Embedding) -> bool:
    return not module.sparse and module.max_norm is None and not module.scale_grad_by_freq


def _trains(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad


class _Root(torch.autograd.Function):
    """A node whose backward makes the gradients of a product's leaves: the engine then does as always."""

    @staticmethod
    def forward(ctx: Any, product: Product, one: Tensor, *leaves: Tensor) -> Tensor:
        ctx.product = product
        return one.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        product, ctx.product = ctx.product, None
        return (None, None, *product.compute())


def _wide(tensor: Tensor) -> torch.dtype:
    """The dtype in which autocast, if it is on, computes with ``tensor``."""
    kind = tensor.device.type
    if torch.is_autocast_enabled(kind) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return tensor.dtype


class _Linear(torch.autograd.Function):
    """``F.linear``, also under autocast, whose weight product can be put off.

    ``anchor`` is in the graph so that I meets this node also where nothing before it trains.
    """

    @staticmethod
    def forward(
        ctx: Any, source: Tensor, weight: Tensor, bias: Tensor | None, anchor: Tensor, deferral: Deferral
    ) -> Tensor:
        dtype = _wide(source)
        narrow = source.to(dtype)
        ctx.save_for_backward(narrow)
        # Parameters themselves, not what hooks on saved tensors (recomputation) would give instead of them.
        ctx.weight, ctx.bias, ctx.deferral, ctx.source_dtype = weight, bias, deferral, source.dtype
        return F.linear(narrow, weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (source,), weight, bias, deferral = ctx.saved_tensors, ctx.weight, ctx.bias, ctx.deferral
        needs_source, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        towards = None
        if needs_source:
            towards = gradient.matmul(weight.to(gradient.dtype)).to(ctx.source_dtype)
        leaves = tuple(each for each, needed in ((weight, needs_weight), (bias, needs_bias)) if needed)
        dtypes = tuple(leaf.dtype for leaf in leaves)

        def compute() -> tuple[Tensor, ...]:
            rows = gradient.reshape(-1, gradient.shape[-1])
            found = []
            if needs_weight:
                found.append(rows.t().mm(source.reshape(-1, source.shape[-1])))
            if needs_bias:
                found.append(rows.sum(0))
            return tuple(each.to(dtype) for each, dtype in zip(found, dtypes, strict=True))

        if deferral.add(leaves, compute):
            return towards, None, None, None, None
        made = iter(compute())
        return towards, next(made) if needs_weight else None, next(made) if needs_bias else None, None, None


class _Lookup(torch.autograd.Function):
    """``F.embedding`` whose gradient, as large as the table, can be put off."""

    @staticmethod
    def forward(ctx: Any, indices: Tensor, weight: Tensor, padding: int | None, deferral: Deferral) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.weight, ctx.padding, ctx.deferral = weight, padding, deferral
        return F.embedding(indices, weight, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (indices,), weight, deferral = ctx.saved_tensors, ctx.weight, ctx.deferral
        rows, padding = weight.shape[0], -1 if ctx.padding is None else ctx.padding

        def compute() -> tuple[Tensor, ...]:
            return (torch.ops.aten.embedding_dense_backward(gradient, indices, rows, padding, False),)

        if deferral.add((weight,), compute):
            return None, None, None, None
        return None, compute()[0], None, None
