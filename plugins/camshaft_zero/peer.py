"""The torch provider behind the plugin's calls."""

from __future__ import annotations

from typing import TYPE_CHECKING

from camshaft_zero.costs import summed_each
from camshaft_zero.fully_shard import TorchStorage
from camshaft_zero.provider import Storage

if TYPE_CHECKING:
    from torch.nn import Module

    from camshaft.hookspecs import Forward
    from camshaft.state import State, World
    from camshaft_zero.options import Options
    from camshaft_zero.placement import Placement


class Peer(Storage):
    """Stages 2 and 3 by ``fully_shard``; the model is on meta."""

    def __init__(self, options: Options, placement: Placement, world: World, model: Module) -> None:
        self._world = world
        self._inner = TorchStorage(
            world,
            model,
            reshard_after_forward=placement.parameters and options.reshard_after_forward,
            reduce="each" if summed_each(options, placement) else "last",
        )

    def materialize(self, model: Module) -> None:
        self._inner.materialize(self._world, model)

    def around_forward(self, state: State, call: Forward) -> Forward:
        return self._inner.around_forward(state, call)

    def bind(self, state: State) -> None:
        """Torch has put its hooks on the modules already."""

    def end_backward(self) -> None:
        """Torch's own callback has run at the end of backward."""

    def reduce(self, state: State) -> None:
        self._inner.reduce()

    def publish(self) -> None:
        """The parts are the shards; the next forward gathers them."""
        self._inner.reshard()

    def refresh(self) -> None:
        self._inner.reshard()

    def release(self, state: State) -> None:
        for parameter in state.model.parameters():
            parameter.grad = None
        for part in state.world.parts:
            part.tensor.grad = None

    def close(self, finished: bool) -> None:
        """Torch's hooks stay: they belong to the module's class, and the run is over."""
