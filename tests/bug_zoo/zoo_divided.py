"""Bugs of models that are divided over ranks: tensor and sequence parallel, pipelines, sharded storage."""

from __future__ import annotations

from torch import nn

from camshaft import hookimpl
from camshaft_pipeline import Plugin as Pipeline
from camshaft_tensor_parallel import Plugin as TensorParallel
from camshaft_zero import Plugin as Zero


class NormsNotSummed(TensorParallel):
    """Under sequence parallel every rank has the gradient of its own tokens for the norms, and keeps it."""

    @hookimpl
    def reduce_parts(self) -> None:
        pass


class SameMask(TensorParallel):
    """Dropout of features that ranks divided draws the same mask on each of them."""

    @hookimpl
    def shard_compute(self, world, model) -> None:
        super().shard_compute(world, model)
        self._sharding._drawing.call = lambda function, arguments, named: function(*arguments, **named)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                vars(module).pop("forward", None)


class MovingAverage(Pipeline):
    """Gradients are scaled after every microbatch instead of once."""

    @hookimpl
    def post_backward(self, state) -> None:
        for parameter in state.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(0.5)


class DriftingTies(Pipeline):
    """The copy of a tied matrix on the last stage is sent once, and never again."""

    @hookimpl
    def handlers(self, state):
        found = super().handlers(state)
        genuine = self._ties.start_window
        begun = []

        def start() -> None:
            if begun:
                for owner in self._ties._owners:
                    owner.gradient, owner._back = None, None
                for borrower in self._ties._borrowers:
                    borrower._left = borrower._backwards
                return
            begun.append(1)
            genuine()

        self._ties.start_window = start
        return found


class EarlyGather(Zero):
    """Updated parameters leave before the optimizer has updated them."""

    @hookimpl
    def around_step(self, state, call):
        storage = self._bound()

        def step() -> None:
            storage.publish()
            call()

        return step
