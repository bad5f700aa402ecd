"""One call of a module whose activations are made again: what stays of it until backward.

The form is that of ``torch.utils.checkpoint`` without reentrance: hooks on saved tensors put an empty slot in place of
each tensor that autograd saves, and the first slot that backward opens lets the module run once more, in the order of
the first time, until the last slot is filled. It is one of our own because it is to know what it saves, keep results of
operations without a mode over every other one, and hold no graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from camshaft_recompute.ambient import Ambient
from camshaft_recompute.trees import mapped, tensors

if TYPE_CHECKING:
    from camshaft_recompute.keeping import Keeper, Store

Form = tuple[torch.Size, torch.dtype]
Call = Callable[..., Any]
Mode = AbstractContextManager[Any]


class _Enough(Exception):
    """Ends a recomputation: every slot is filled."""


class Slot:
    """Stands for one saved tensor. What it holds goes when autograd lets go of it."""

    __slots__ = ("__weakref__", "form", "frame", "value")

    def __init__(self, frame: Frame, form: Form) -> None:
        self.frame, self.form = frame, form
        self.value: Tensor | None = None


class Frame:
    """One call of module ``name``, from its forward to the end of its backward."""

    def __init__(self, name: str, call: Call, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.name = name
        self._call: Call | None = call
        self._inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = (arguments, named)
        self._slots: list[weakref.ref[Slot]] = []
        self._filled = 0
        self._store: Store | None = None
        self.packed: Callable[[Tensor], None] = lambda tensor: None
        """Told of each tensor that autograd saves."""
        self.again: Callable[[], Mode] = nullcontext
        """Made and entered around the recomputation."""

    def slots(self) -> int:
        """Tensors that autograd has saved so far, in the first run."""
        return len(self._slots)

    def filled(self) -> int:
        """Those of them that are there again, in the second."""
        return self._filled

    @property
    def kept_bytes(self) -> int:
        """Bytes of results that are held for the second run."""
        return 0 if self._store is None else self._store.bytes

    def run(self, device: torch.device, keeper: Keeper | None, around: Mode) -> Any:
        """The module's forward, with what autograd saves dropped, but for results that ``keeper`` keeps."""
        assert self._call is not None and self._inputs is not None
        arguments, named = self._inputs
        self._ambient = Ambient(device)
        self._versions = [(each, each._version) for each in tensors(self._inputs)]
        with ExitStack() as stack:
            stack.enter_context(around)
            if keeper is not None:
                self._store = stack.enter_context(keeper.first(self.slots))
            stack.enter_context(saved_tensors_hooks(self._pack, _unpack))
            made = self._call(*arguments, **named)
        self._ambient.settle()
        if not self._slots:
            self._let_go()
        return made

    def _pack(self, tensor: Tensor) -> Slot:
        self.packed(tensor)
        slot = Slot(self, (tensor.shape, tensor.dtype))
        self._slots.append(weakref.ref(slot))
        return slot

    def fill(self) -> None:
        """Run the module again, up to the last tensor that was saved.

        Raises:
            RuntimeError: inputs were changed in place since, or the second run saves other tensors than the first.
        """
        if self._call is None or self._inputs is None:
            raise RuntimeError(f"'{self.name}': its graph is used again after its backward let go of what it needs")
        for tensor, version in self._versions:
            if tensor._version != version:
                raise RuntimeError(
                    f"'{self.name}' cannot be run again: an input {list(tensor.shape)} was changed in place since its "
                    "forward. Leave it out of plugins.recompute.modules, or change the model not to write into it"
                )
        arguments, named = mapped(self._inputs, _leaf)
        self._filled = 0
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(self._ambient.restored())
            stack.enter_context(self.again())
            if self._store is not None:
                stack.enter_context(self._store.second())
            stack.enter_context(saved_tensors_hooks(self._catch, _same))
            with suppress(_Enough):
                self._call(*arguments, **named)
        if self._filled < len(self._slots):
            self._differs(f"{self._filled} tensors for backward, not {len(self._slots)}")
        self._let_go()

    def _catch(self, tensor: Tensor) -> Tensor:
        value, slot = tensor.detach(), self._slots[self._filled]()
        self._filled += 1
        if slot is not None:
            if slot.form != (value.shape, value.dtype):
                shape, dtype = slot.form
                self._differs(f"{list(value.shape)} {value.dtype} where it had {list(shape)} {dtype}")
            slot.value = value
        if self._filled == len(self._slots):
            raise _Enough
        return value

    def _differs(self, how: str) -> None:
        raise RuntimeError(
            f"'{self.name}' computed something else the second time: it saved {how}. Its forward depends on more than "
            "its inputs, parameters and random numbers; leave it out of plugins.recompute.modules"
        )

    def _let_go(self) -> None:
        """Inputs and kept results: what backward still needs is in the slots."""
        self._call = self._inputs = self._store = None
        self._versions = []


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _unpack(slot: Slot) -> Tensor:
    if slot.value is None:
        slot.frame.fill()
    assert slot.value is not None
    return slot.value


def _same(value: Tensor) -> Tensor:
    return value
