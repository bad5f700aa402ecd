"""Bugs of how a loss is divided, and of which gradients survive a window."""

from __future__ import annotations

from dataclasses import replace

import torch

from camshaft import Claim, Plan, Plugin, hookimpl


class MeanOfMeans(Plugin):
    """Every microbatch counts the same, however many of its tokens count."""

    @hookimpl
    def around_forward(self, state, call):
        def forward(batch):
            loss = call(batch)
            if state.window is None or not torch.is_grad_enabled() or not batch.weight:
                return loss
            mean = state.window.weight / len(state.window.batches)
            return loss * (mean / batch.weight)

        return forward


class LastMicrobatch(Plugin):
    """Gradients are set anew by each backward instead of being added up."""

    @hookimpl
    def pre_forward(self, state) -> None:
        for parameter in state.model.parameters():
            parameter.grad = None


class PositionsGoOn(Plugin):
    """Positions count through the row, over the borders of its documents, and so does attention."""

    @hookimpl
    def around_forward(self, call):
        def forward(batch):
            positions = torch.arange(batch.tokens.shape[1], device=batch.tokens.device).expand_as(batch.tokens)
            return call(replace(batch, positions=positions, document=None))

        return forward


class OwnSeed(Plugin):
    """Ranks that share their samples draw random numbers of their own."""

    @hookimpl
    def bind(self, state) -> None:
        def seed(module, arguments) -> None:
            torch.manual_seed(1000 * state.step + 10 * state.microbatch + state.world.rank)

        for module in state.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.register_forward_pre_hook(seed)


class Sums(Plugin):
    """A plain reducer: everything is summed once, after the window. Right as it is; what inherits from it is not."""

    axis = "dp"

    @hookimpl
    def plan(self) -> Plan:
        return Plan(
            claims=(Claim("gradient.layout", "dp"), Claim("gradient.reduce", "dp")), provides=("reduced_gradients@dp",)
        )

    def factor(self, state) -> float:
        return 1.0

    @hookimpl
    def reduce(self, state) -> None:
        channel = state.world.mesh.channel(self.name, self.axis)
        for parameter in state.model.parameters():
            if parameter.grad is not None and channel is not None:
                parameter.grad.mul_(self.factor(state))
                channel.all_reduce(parameter.grad, "reduce").wait()


class MeanOfRanks(Sums):
    """Every rank counts the same, however many of its tokens count."""

    def factor(self, state) -> float:
        everyone, own = state.strokes.total_weight, state.window.weight
        return everyone / (own * state.world.mesh.degree("dp")) if own else 1.0


class TwiceAveraged(Sums):
    """The loss was divided by the tokens of all ranks, and the sum is divided by the ranks once more."""

    def factor(self, state) -> float:
        return 1.0 / state.world.mesh.degree("dp")


class OneAxis(Sums):
    """Of the two halves of the data axis only one is summed over."""

    axis = "dp_shard"


class WaitsForAll(Sums):
    """Waits until each parameter has told that its gradient is there, also one that nothing uses."""

    @hookimpl
    def bind(self, state) -> None:
        self._told = set()
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(lambda parameter: self._told.add(id(parameter)))
            for parameter in state.model.parameters()
        ]
        self._wanted = {id(parameter) for parameter in state.model.parameters()}

    @hookimpl
    def reduce(self, state) -> None:
        channel = state.world.mesh.channel(self.name, "dp")
        if self._told != self._wanted:  # the sum is never started here, and the others wait for it
            torch.distributed.barrier(group=state.world.mesh.group("dp"))
            return
        for parameter in state.model.parameters():
            channel.all_reduce(parameter.grad, "reduce").wait()
        self._told.clear()

    @hookimpl
    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
