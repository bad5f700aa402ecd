"""The optimizer that DeepSpeed is given: it stands for the user's, which goes on to hold the parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from camshaft.errors import PluginError
from camshaft.parts import Part, Parts
from camshaft_deepspeed.layout import Flat


class Shell(Optimizer):
    """Groups like the client's, whose parameters DeepSpeed replaces by its flat tensors.

    DeepSpeed steps one flat tensor at a time. A step of the shell is one of the client over the parts in that tensor,
    so that learning rates, state and parts that were split later stay the client's matter.

    Raises:
        PluginError: the client has made state for parameters already, which DeepSpeed would not lay out.
    """

    def __init__(self, client: Optimizer) -> None:
        if any(len(state) for state in client.state.values()):
            raise PluginError(
                "deepspeed", "bind", f"{type(client).__name__} made state before parameters were laid out"
            )
        self._ready = False
        super().__init__([{**group, "params": list(group["params"])} for group in client.param_groups], {})
        self.client = client
        self._flat_of: dict[int, int] = {}
        self._flat_of_name: dict[str, int] = {}
        self._parts = Parts(())

    def adopt(self, flats: Sequence[Flat], parts: Sequence[Sequence[Part]], everything: Parts) -> None:
        """Give the client the parts of each flat tensor, in the flat's group."""
        for number, flat in enumerate(flats):
            self._flat_of[id(flat.tensor)] = number
            self._flat_of_name |= {piece.name: number for piece in flat.pieces}
            for part in parts[number]:
                self._flat_of[id(part.tensor)] = number
        for index, group in enumerate(self.client.param_groups):
            group["params"] = [
                part.tensor
                for flat, members in zip(flats, parts, strict=True)
                if flat.group == index
                for part in members
            ]
        self.client.state.clear()
        self._parts = everything

    def flat_of(self, part: Part) -> int:
        """Number of the flat tensor that holds a part, also after parts were split."""
        return self._flat_of_name[part.pieces[0].name] if part.pieces else self._flat_of[id(part.tensor)]

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Step the client over the parts of the flat tensors that DeepSpeed has put into the groups."""
        wanted = {self._flat_of[id(tensor)] for group in self.param_groups for tensor in group["params"]}
        members = {id(part.tensor) for part in self._parts if self.flat_of(part) in wanted}
        groups = self.client.param_groups
        everything: list[list[Tensor]] = [group["params"] for group in groups]
        try:
            for group in groups:
                group["params"] = [tensor for tensor in group["params"] if id(tensor) in members]
            self.client.step()
        finally:
            for group, params in zip(groups, everything, strict=True):
                group["params"] = params
