"""DeepSpeed's engine in our loop: what surrounds each backward, and the step.

``DeepSpeedEngine.backward`` is a prologue, autograd and an epilogue. Autograd is the core's here, so the prologue runs
in a hook on the loss, and the epilogue after the backward. The window, not a counter, says which backward is the last.
"""

from __future__ import annotations

import contextlib
import io
import logging
from typing import Any

from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from camshaft.state import State
from camshaft_deepspeed.config import Config
from camshaft_deepspeed.usage import Usage


class Engine:
    """What all stages have in common."""

    usage: Usage

    def __init__(self, state: State, optimizer: Optimizer, config: Config) -> None:
        self.state = state
        engine = _initialize(state.model, optimizer, config)
        engine._running_engine_backward = True  # prologue and epilogue are called here, not by autograd
        self.engine: Any = engine

    def watch(self, loss: Tensor) -> Tensor:
        """Let the backward of ``loss`` begin with DeepSpeed's prologue."""
        if loss.requires_grad:
            loss.register_hook(lambda gradient: self.begin_backward())  # type: ignore[no-untyped-call]
        return loss

    def begin_backward(self) -> None:
        """Tell DeepSpeed that a backward begins, and whether it is the window's last."""
        self.engine.set_gradient_accumulation_boundary(self.state.final_backward)
        self.usage.begin()
        self.engine._backward_prologue()

    def end_backward(self) -> None:
        """DeepSpeed's epilogue: what is in buckets still is reduced."""
        self.engine._backward_epilogue()

    def reduce(self) -> None:
        """Show the reduced gradients in ``part.tensor.grad``; a parameter that nothing used has none."""
        raise NotImplementedError

    def step(self) -> None:
        """DeepSpeed's step: it calls the client's."""
        self.engine.step()

    def release(self) -> None:
        """Drop gradients, and sums that DeepSpeed would go on adding to."""
        raise NotImplementedError

    def spread(self) -> None:
        """Make parameters of master weights that were loaded."""

    def close(self) -> None:
        """Take every hook off the model, which keeps its weights."""
        self.usage.close()
        self.engine.destroy()
        for handle in (self.engine.module_forward_pre_hook, self.engine.module_forward_post_hook):
            handle.remove()


def _initialize(model: Module, optimizer: Optimizer, config: Config) -> Any:
    """Without DeepSpeed's warning of optimizers that it has not tested, and without the memory that it prints."""
    import deepspeed

    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    finally:
        logger.setLevel(logging.WARNING)
    return engine
