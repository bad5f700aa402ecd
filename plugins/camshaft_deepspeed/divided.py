"""Stages 1 to 3: DeepSpeed's flat tensors as parts, their gradients, its step."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import Module, Parameter

from camshaft.comm import Channel
from camshaft.models.roles import Initial
from camshaft.parts import Part, Parts
from camshaft.state import State
from camshaft_deepspeed.config import Config
from camshaft_deepspeed.engine import Engine
from camshaft_deepspeed.layout import Flat, parts_of, stored_parts, zero_padding
from camshaft_deepspeed.material import exact_masters
from camshaft_deepspeed.options import Options
from camshaft_deepspeed.shell import Shell
from camshaft_deepspeed.stages import stage_of
from camshaft_deepspeed.usage import Usage


class Divided(Engine):
    """The engine of stage 1, 2 or 3 around ``state.model`` and ``state.optimizer``, whose parameters become parts."""

    def __init__(
        self,
        state: State,
        options: Options,
        config: Config,
        initial: Mapping[str, Initial],
        channel: Channel | None,
    ) -> None:
        self._shell = Shell(state.optimizer)
        super().__init__(state, self._shell, config)
        self._scatters = options.stage == 3
        self._size = state.world.mesh.degree("dp")
        self._zero: Any = self.engine.optimizer
        self._stage = stage_of(self._zero)
        self._flats = self._stage.flats(state.model)
        self._publish(initial, channel)
        self._takes_last = options.offload_optimizer != "none" or (options.stage == 1 and bool(options.overlap_comm))
        self._reduces_each, self._first = options.stage > 1, True
        self.usage = Usage(state.model, channel)

    def _publish(self, initial: Mapping[str, Initial], channel: Channel | None) -> None:
        """Let the world and the client see DeepSpeed's flat tensors."""
        world, model = self.state.world, self.state.model
        for flat in self._flats:
            zero_padding(flat)
        if world.policy.param != world.policy.master:
            exact_masters(self._flats, initial, world.recipe.seed)
        found = [list(parts_of(flat, world.roles)) for flat in self._flats]
        world.parts = Parts([part for parts in found for part in parts], channel)
        if self._scatters:
            world.stored = stored_parts(model, world.roles, channel)
        self._shell.adopt(self._flats, found, world.parts)

    def begin_backward(self) -> None:
        """DeepSpeed counts backwards when a forward begins; here it is told by the backward itself."""
        self._zero.clear_backward_seen_flag()
        super().begin_backward()

    def end_backward(self) -> None:
        """See that all ranks have the same to reduce, and reduce it.

        Looking waits for the device: in the first window before each reduction, later once a window.
        """
        final, each = self.state.final_backward, self._reduces_each and self._first
        if final or each:
            self.usage.check_ranks(window=not each)
        if final and self._takes_last:
            self.usage.check_last()
        super().end_backward()

    def reduce(self) -> None:
        """Show the reduced gradients as those of the parts; a parameter that nothing used has none."""
        unused = self.usage.unused(everywhere=False)
        parts = self.state.world.parts
        if unused:
            parts.isolate(unused, self.state.optimizer)
        gradients = [self._stage.gradient(number, flat.tensor) for number, flat in enumerate(self._flats)]
        if self._scatters and self._size > 1:
            for gradient in gradients:
                gradient.mul_(self._size)  # stage 3 always averages over the ranks, where a sum is wanted
        for part in parts:
            number = self._shell.flat_of(part)
            used = not any(piece.name in unused for piece in part.pieces)
            part.tensor.grad = _view(gradients[number], part, self._flats[number]) if used else None

    def step(self) -> None:
        """DeepSpeed's step: it calls the client's for each flat tensor, and spreads the new weights.

        It does nothing where the norm is not finite; the core stops the run at the next record then.
        """
        super().step()
        if self._zero.overflow:
            self.state.skipped = True

    def release(self) -> None:
        """Drop gradients, and sums that DeepSpeed would go on adding to."""
        self._stage.forget()
        for part in self.state.world.parts:
            part.tensor.grad = None
        self.usage.forget()
        self._first = False

    def spread(self) -> None:
        """Make parameters of master weights that were loaded."""
        self._stage.spread()

    def close(self) -> None:
        """Take every hook off the model; in stage 3 it stays divided as it is, less what lies on a disk."""
        super().close()
        if self._scatters:
            _plain_modules(self.state.model)
            _clear_disk(self.state.model)


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


def _clear_disk(model: Module) -> None:
    """Remove this rank's files, and folders that nobody else has files in."""
    swapper = next(iter(model.parameters())).nvme_swapper  # type: ignore[attr-defined]
    if swapper is None:
        return
    folder = Path(swapper.swap_folder)
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        for parent in list(folder.parents)[:3]:
            parent.rmdir()
