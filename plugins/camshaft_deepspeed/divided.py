"""Stages 1 to 3: DeepSpeed's flat tensors as parts, their gradients, its step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from camshaft.comm import Channel
from camshaft.parts import Part, Parts
from camshaft.state import State
from camshaft_deepspeed.config import Config
from camshaft_deepspeed.engine import Engine
from camshaft_deepspeed.layout import Flat, flats, parts_of, stored_parts, zero_padding
from camshaft_deepspeed.material import exact_masters
from camshaft_deepspeed.options import Options
from camshaft_deepspeed.shell import Shell
from camshaft_deepspeed.usage import Usage


class Divided(Engine):
    """The engine of stage 1, 2 or 3 around ``state.model`` and ``state.optimizer``, whose parameters become parts."""

    def __init__(self, state: State, options: Options, config: Config, channel: Channel | None) -> None:
        self._shell = Shell(state.optimizer)
        super().__init__(state, self._shell, config)
        self._stage = options.stage
        self._offloads = options.offload_optimizer != "none"
        self._size = state.world.mesh.degree("dp")
        self._zero: Any = self.engine.optimizer
        self._flats = flats(self._zero, state.model, options.stage)
        self._publish(channel)
        late = self._offloads or (options.stage == 1 and bool(options.overlap_comm))
        self.usage = Usage(state.model, channel, alike=True, every_backward=late)

    def _publish(self, channel: Channel | None) -> None:
        """Let the world and the client see DeepSpeed's flat tensors."""
        world, model = self.state.world, self.state.model
        for flat in self._flats:
            zero_padding(flat)
        if world.policy.param != world.policy.master:
            exact_masters(model, self._flats, world.recipe.seed)
        found = [list(parts_of(flat, world.roles)) for flat in self._flats]
        world.parts = Parts([part for parts in found for part in parts], channel)
        if self._stage == 3:
            world.stored = stored_parts(model, world.roles, channel)
        self._shell.adopt(self._flats, found, world.parts)

    def begin_backward(self, gradient: Tensor) -> Tensor:
        """Stage 3 always averages over the ranks, where a sum is wanted."""
        self._zero.clear_backward_seen_flag()
        fresh = super().begin_backward(gradient)
        return fresh * self._size if self._stage == 3 else fresh

    def reduce(self) -> None:
        """Show the reduced gradients as those of the parts; a parameter that nothing used has none."""
        unused = self.usage.settle()
        parts = self.state.world.parts
        if unused:
            parts.isolate(unused, self.state.optimizer)
        gradients = [self._gradient(number) for number in range(len(self._flats))]
        for part in parts:
            number = self._shell.flat_of(part)
            if any(piece.name in unused for piece in part.pieces):
                part.tensor.grad = None
            else:
                part.tensor.grad = _view(gradients[number], part, self._flats[number])

    def _gradient(self, number: int) -> Tensor:
        """One flat gradient in the master dtype, which DeepSpeed's step then takes as it is."""
        flat = self._flats[number].tensor
        if self._offloads:
            held: Tensor | None = flat.grad
            assert held is not None
            return held
        averaged = self._zero.averaged_gradients[number]
        whole = getattr(averaged, "flat_partition", None)
        if whole is None:
            whole = _joined(averaged)
        whole = whole.view(-1)[: flat.numel()].to(flat.dtype)
        self._zero.averaged_gradients[number] = Whole(whole)
        return whole

    def step(self) -> None:
        """DeepSpeed's step: it calls the client's for each flat tensor, and spreads the new weights."""
        super().step()
        self.state.skipped = bool(self._zero.overflow)

    def release(self) -> None:
        """Drop gradients, and sums that DeepSpeed would go on adding to."""
        zero = self._zero
        zero.zero_grad(set_to_none=True)
        for part in self.state.world.parts:
            part.tensor.grad = None
        if self._stage == 3:
            zero.grad_partitions_flat_buffer.zero_()
        elif self._offloads:
            zero.accumulated_grads_in_cpu.clear()
        if not self._offloads:
            zero.averaged_gradients.clear()
        self.usage.forget()

    @torch.no_grad()
    def spread(self) -> None:
        """Make parameters of master weights that were loaded."""
        if self._stage < 3:
            self._zero.update_lp_params()
            return
        self._zero._partition_all_parameters()
        for number in range(len(self._flats)):
            self._zero._reassign_or_swap_out_partitioned_parameters(number)

    def close(self) -> None:
        """Take every hook off the model; it keeps its weights, in stage 3 divided as they are."""
        super().close()
        if self._stage == 3:
            _plain_modules(self.state.model)


class Whole(list[Tensor]):
    """Gradients of a group that lie side by side already; DeepSpeed takes ``flat_partition`` without a copy."""

    def __init__(self, flat: Tensor) -> None:
        super().__init__([flat])
        self.flat_partition = flat


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat([tensor.reshape(-1) for tensor in tensors])


def _view(gradient: Tensor, part: Part, flat: Flat) -> Tensor:
    begin = part.tensor.storage_offset() - flat.tensor.storage_offset()
    return gradient[begin : begin + part.tensor.numel()]


def _plain_modules(model: Module) -> None:
    """Undo what stage 3 puts in place of each module's table of parameters."""
    from deepspeed.runtime.zero import parameter_offload

    stack = parameter_offload.FWD_MODULE_STACK
    if stack and stack[-1] is model:
        stack.pop()
    for module in model.modules():
        module._parameters = dict[str, Parameter | None](module._parameters)
        module.__dict__.pop("_original_parameters", None)
