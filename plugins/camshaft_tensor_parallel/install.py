"""What modules of a plan exchange, put on them as hooks, or as a forward of their own.

Layers stay layers: they are called, with their own forward wherever that will do, so that what other plugins do with
them (gather parameters, put products off) works here as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from camshaft_tensor_parallel import overlap
from camshaft_tensor_parallel.ahead import Ahead
from camshaft_tensor_parallel.drawing import Drawing
from camshaft_tensor_parallel.line import Line, narrow
from camshaft_tensor_parallel.shares import Place
from camshaft_tensor_parallel.styles import Style
from camshaft_tensor_parallel.vocabulary import Range, cross_entropy

Styled = Mapping[str, tuple[nn.Module, Style]]


class Installed:
    """Hooks and forwards on modules, to be taken off again."""

    def __init__(self, line: Line, *, overlap: bool) -> None:
        self.line, self._overlap = line, overlap
        self.ahead: list[Ahead] = []
        """Regions that overlap their gather with products."""
        self._handles: list[RemovableHandle] = []
        self._changed: list[nn.Module] = []

    def install(self, modules: Styled) -> None:
        """Give each module what its style says; parameters still have their whole shapes."""
        sizes = [_vocabulary(module) for module, style in modules.values() if style.kind == "logits"]
        for name, (module, style) in modules.items():
            match style.kind:
                case "region":
                    self._region(module, _layers(name, modules) if self._overlap else [])
                case "logits" if self._overlap and is_plain(module):
                    self._overlapping_head(module)
                case "logits":
                    self._handles.append(module.register_forward_pre_hook(self._enter))
                case "row":
                    self._row(module)
                case "embedding":
                    self._embedding(module)
                case "loss" if sizes:  # a rank of a pipeline that makes no loss has no logits
                    self._loss(module, Range.of(sizes[0], self.line))

    def draw(self, module: nn.Module, place: Place, drawing: Drawing) -> None:
        """Let what ``module`` draws be what one process draws. Before ``install``."""
        is_dropout = type(module).forward is nn.Dropout.forward
        self._replace(module, drawing.dropout(module, place) if is_dropout else drawing.around(place, module.forward))

    def close(self) -> None:
        """Take everything off."""
        for handle in self._handles:
            handle.remove()
        for module in self._changed:
            vars(module).pop("forward", None)
        self._handles, self._changed = [], []

    def _replace(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        module.forward = forward
        self._changed.append(module)

    def _enter(self, _: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return self.line.enter(arguments[0]), *arguments[1:]

    def _leave(self, _: nn.Module, __: Any, partial: Tensor) -> Tensor:
        return self.line.leave(partial)

    def _region(self, module: nn.Module, layers: list[nn.Module]) -> None:
        inner, enter = module.forward, self.line.enter
        if layers:
            ahead = Ahead(inner, layers, self.line)
            self.ahead.append(ahead)
            self._replace(module, ahead.forward)
            for layer in layers:
                self._replace(layer, ahead.layer(layer))
            return

        def forward(hidden: Tensor, *rest: Any, **named: Any) -> Any:
            return inner(enter(hidden), *rest, **named)

        self._replace(module, forward)

    def _row(self, module: nn.Module) -> None:
        if self._overlap and is_plain(module):
            self._overlapping_row(module)
            return
        if getattr(module, "bias", None) is None:
            self._handles.append(module.register_forward_hook(self._leave))
            return
        row: Any = module

        def forward(features: Tensor) -> Tensor:
            summed = self.line.leave(F.linear(features, row.weight))
            bias: Tensor = row.bias
            return summed + bias.to(summed.dtype)

        self._replace(module, forward)

    def _overlapping_head(self, head: Any) -> None:
        def forward(hidden: Tensor) -> Tensor:
            if overlap.divides(self.line):
                return overlap.enter(narrow(hidden), self.line, (head.weight, head.bias))[1]
            return F.linear(self.line.enter(hidden), head.weight, head.bias)

        self._replace(head, forward)

    def _overlapping_row(self, row: Any) -> None:
        def forward(features: Tensor) -> Tensor:
            features = narrow(features)
            if overlap.divides(self.line):
                summed = overlap.leave(features, row.weight, self.line)
            else:
                summed = self.line.leave(F.linear(features, row.weight))
            return summed if row.bias is None else summed + row.bias.to(summed.dtype)

        self._replace(row, forward)

    def _embedding(self, table: Any) -> None:
        """The table stays an ordinary one, of this rank's rows; what other ranks have is filled with zeros."""
        own, line = Range.of(table.num_embeddings, self.line), self.line
        away = torch.empty(0)

        def before(_: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
            nonlocal away
            line.see(arguments[0])
            places, away = own.places(arguments[0])
            return (places,)

        def after(_: nn.Module, __: Any, found: Tensor) -> Tensor:
            return line.leave(found.masked_fill(away.unsqueeze(-1), 0.0))

        if table.padding_idx is not None:
            inside = own.start <= table.padding_idx < own.stop
            table.padding_idx = table.padding_idx - own.start if inside else None
        self._handles.append(table.register_forward_pre_hook(before))
        self._handles.append(table.register_forward_hook(after))

    def _loss(self, module: nn.Module, own: Range) -> None:
        def forward(logits: Tensor, labels: Tensor) -> Tensor:
            return cross_entropy(logits, labels, own, self.line)

        self._replace(module, forward)


def is_plain(module: nn.Module) -> bool:
    """Whether a module is a linear layer whose forward is torch's own."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _layers(region: str, modules: Styled) -> list[nn.Module]:
    """Linear layers of ``region`` that are divided by columns."""
    return [
        module
        for name, (module, style) in modules.items()
        if style.kind in ("column", "shared") and name.startswith(f"{region}.") and is_plain(module)
    ]


def _vocabulary(head: Any) -> int:
    """Rows of an output projection that is not divided yet; it may have no weight yet where a pipeline ties it."""
    size: int = head.out_features if hasattr(head, "out_features") else head.weight.shape[0]
    return size


@torch.no_grad()
def narrow_parameter(parameter: nn.Parameter, shape: tuple[int, ...]) -> None:
    """Let a parameter on meta have ``shape``. It stays the same object, and so do ties and what was set on it."""
    if tuple(parameter.shape) != shape:
        parameter.data = torch.empty(shape, dtype=parameter.dtype, device=parameter.device)
