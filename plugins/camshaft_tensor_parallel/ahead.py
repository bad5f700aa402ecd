"""Regions whose first products are made while their input is gathered (``async``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from camshaft_tensor_parallel.line import Line, narrow
from camshaft_tensor_parallel.overlap import divides, enter


class Ahead:
    """One region. Forwards of a window tell which of ``layers`` multiply the region's input itself; from the next one
    on these products are made by the gather, and the layers hand them over when they are called. Within a window every
    forward does the same, so that one which is run again does what it did.

    Hooks before a layer's forward run before the gather too (a parameter may be on its way). Layers on which there are
    hooks of other kinds, and batches that ranks share unevenly, go without overlap.
    """

    def __init__(self, inner: Callable[..., Any], layers: Sequence[nn.Module], line: Line) -> None:
        self._inner, self._layers, self._line = inner, tuple(layers), line
        self._seen: set[nn.Module] = set()
        self._known: frozenset[nn.Module] = frozenset()
        self._asking = False
        self._whole: Tensor | None = None
        self._made: dict[nn.Module, Tensor] = {}
        self._forwards: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
        self.overlapped = 0
        """How many forwards overlapped."""

    def forward(self, hidden: Tensor, *rest: Any, **named: Any) -> Any:
        """The region's forward on this rank's tokens."""
        hidden = narrow(hidden)
        layers = self._free() if self._known and divides(self._line) else ()
        if layers:
            self._whole = self._products(hidden, layers)
            self.overlapped += 1
        else:
            self._whole = self._line.enter(hidden)
        try:
            return self._inner(self._whole, *rest, **named)
        finally:
            self._whole, self._made = None, {}

    def end_window(self) -> None:
        """Take what was learned into use."""
        self._known = frozenset(self._seen)

    def layer(self, layer: Any) -> Callable[[Tensor], Tensor]:
        """A forward for ``layer``, of this region."""

        def forward(features: Tensor) -> Tensor:
            if self._asking:
                return features
            if features is self._whole:
                self._seen.add(layer)
                made = self._made.pop(layer, None)
                if made is not None:
                    return made
            return F.linear(features, layer.weight, layer.bias)

        self._forwards[layer] = forward
        return forward

    def _free(self) -> tuple[nn.Module, ...]:
        return tuple(
            layer
            for layer in self._layers
            if layer in self._known
            and not (layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks)
            and vars(layer).get("forward") is self._forwards[layer]  # nobody has put another one there
        )

    def _products(self, hidden: Tensor, layers: tuple[Any, ...]) -> Tensor:
        self._asking = True
        try:
            for layer in layers:
                if layer._forward_pre_hooks:
                    layer(hidden)
        finally:
            self._asking = False
        weights = [each for layer in layers for each in (layer.weight, layer.bias)]
        whole, *made = enter(hidden, self._line, weights)
        self._made = dict(zip(layers, made, strict=True))
        return whole
