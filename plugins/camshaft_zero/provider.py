"""What the plugin asks of whoever stores the model: flat buffers of ours, or torch's ``fully_shard``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.nn import Module

    from camshaft.hookspecs import Forward
    from camshaft.state import State


class Storage(ABC):
    """Parameters, gradients and the optimizer's values of a run, in the order of calls."""

    @abstractmethod
    def materialize(self, model: Module) -> None:
        """Storage and first values; sets ``world.parts``, ``world.stored`` and ``world.readable``."""

    @abstractmethod
    def around_forward(self, state: State, call: Forward) -> Forward:
        """Wrap the model's forward; called once, before ``bind``."""

    @abstractmethod
    def bind(self, state: State) -> None:
        """Everything is built; put hooks on parameters and modules."""

    @abstractmethod
    def end_backward(self) -> None:
        """After the backward of a microbatch."""

    @abstractmethod
    def reduce(self, state: State) -> None:
        """Finish all sums, and give each part its gradient; parameters that nobody used have none."""

    @abstractmethod
    def publish(self) -> None:
        """After the optimizer: every copy follows, now or while the next forward runs."""

    @abstractmethod
    def refresh(self) -> None:
        """Make everything follow from the master values, and wait for it."""

    @abstractmethod
    def release(self, state: State) -> None:
        """Drop all gradients."""

    @abstractmethod
    def close(self, finished: bool) -> None:
        """Remove all hooks."""
