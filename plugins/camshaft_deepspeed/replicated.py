"""Stage 0: DeepSpeed's all-reduce of whole gradients, and the user's optimizer over the model's own parameters.

Narrow parameters have the core's masters here: DeepSpeed's own wrapper for bf16 would add gradients up in bf16.
"""

from __future__ import annotations

from camshaft.comm import Channel
from camshaft.state import State
from camshaft_deepspeed.config import Config
from camshaft_deepspeed.engine import Engine
from camshaft_deepspeed.usage import Usage


class Replicated(Engine):
    """The engine of stage 0."""

    def __init__(self, state: State, config: Config, channel: Channel | None) -> None:
        super().__init__(state, state.optimizer, config)
        self._named = dict(state.model.named_parameters())
        self.usage = Usage(state.model, channel)

    def reduce(self) -> None:
        """Take away the zeros that DeepSpeed makes of a gradient that no rank has."""
        for name in self.usage.unused(everywhere=True):
            self._named[name].grad = None

    def release(self) -> None:
        """Drop all gradients."""
        for parameter in self._named.values():
            parameter.grad = None
        for part in self.state.world.parts:
            part.tensor.grad = None
        self.usage.forget()
