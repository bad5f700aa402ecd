"""A module with a forward of its own, that lets its activations be made again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from camshaft_recompute.frame import Frame
from camshaft_recompute.keeping import Keeper
from camshaft_recompute.kinds import Keep
from camshaft_recompute.tally import Tally
from camshaft_recompute.trees import tensors
from camshaft_recompute.watching import Watch


class Region:
    """Module ``name``, from ``install`` to ``close``."""

    def __init__(self, name: str, module: Module, device: torch.device, tally: Tally, keep: Keep | None) -> None:
        self.name, self.module, self.inner = name, module, module.forward
        self._own = vars(module).get("forward")
        self._device, self._tally = device, tally
        self._contexts: dict[str, Any] = {} if keep is None else {"context_fn": contexts_of(keep)}
        self.keeper = None if keep is None else Keeper(keep)
        self.plain = False
        """Whether it is left as it is after all."""
        self.compiled = False
        """Whether a compiler has taken the forward over: what is saved is up to it."""

    def install(self) -> None:
        """Take the place of the module's forward."""
        self.module.forward = self.forward

    def close(self) -> None:
        """Give it back; where another plugin has put its own around it, do nothing any more."""
        self.plain = True
        if vars(self.module).get("forward") == self.forward:
            del self.module.forward
            if self._own is not None:
                self.module.forward = self._own

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """The module's own; where gradients are wanted, without what autograd saves."""
        if self.plain or not torch.is_grad_enabled():
            return self.inner(*arguments, **named)
        if torch.compiler.is_compiling():
            return self._traced(arguments, named)
        frame = Frame(self.name, self.inner, arguments, named)
        if self._tally.counts:
            return self._counted(frame, arguments, named)
        return frame.run(self._device, self.keeper, nullcontext())

    def _traced(self, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """torch's own form, which a compiler knows."""
        self.compiled = True
        contexts: dict[str, Any] = self._contexts
        return checkpoint(self.inner, *arguments, use_reentrant=False, **contexts, **named)

    def _counted(self, frame: Frame, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        saved: list[Tensor] = []
        seen = self._tally.seen(self.name)
        frame.packed = saved.append
        frame.again = partial(Watch, self._device, frame.filled, seen.again)
        made = frame.run(self._device, self.keeper, Watch(self._device, frame.slots, seen.first))
        frame.packed = _ignore
        if saved:
            self._tally.add(seen, saved, list(tensors([arguments, named])), self.module, frame.kept_bytes)
        return made


def _ignore(tensor: Tensor) -> None:
    """After the first run nobody counts."""


@cache
def contexts_of(keep: Keep) -> Callable[[], Any]:
    """What ``checkpoint`` takes as ``context_fn``. A compiler guards on its identity: one for all modules."""

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if keep(operation) else CheckpointPolicy.PREFER_RECOMPUTE

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call]

    return contexts
