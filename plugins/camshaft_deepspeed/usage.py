"""Which parameters a window used. DeepSpeed makes zeros of a gradient that is not there; an optimizer moves on them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Module

from camshaft.comm import Channel


class Usage:
    """Notes each gradient that backward makes on this rank, and compares the ranks' notes."""

    def __init__(self, model: Module, channel: Channel | None) -> None:
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._names = [name for name, _ in trained]
        self._channel = None if channel is None or channel.size == 1 else channel
        self._device = trained[0][1].device
        self._window: set[int] = set()
        self._backward: set[int] = set()
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._note(number))  # type: ignore[no-untyped-call]
            for number, (_, parameter) in enumerate(trained)
        ]

    def _note(self, number: int) -> Callable[[Tensor], None]:
        def note(_: Tensor) -> None:
            self._window.add(number)
            self._backward.add(number)

        return note

    def begin(self) -> None:
        """A backward begins."""
        self._backward.clear()

    def forget(self) -> None:
        """The next window begins."""
        self._window.clear()
        self._backward.clear()

    def check_ranks(self, *, window: bool) -> None:
        """Before DeepSpeed reduces what the window, or the backward that ends, has made. Collective.

        DeepSpeed's stages 1 to 3 reduce what each rank has, in the order of use: other sums would come out, or none.
        A bucket that was full before the backward ended is away already, and may have failed by itself.

        Raises:
            RuntimeError: ranks used different parameters.
        """
        if self._channel is None:
            return
        used, left_out = self._flags(self._window if window else self._backward, "post_backward")
        differing = (used & left_out).nonzero().view(-1).tolist()
        if differing:
            raise RuntimeError(
                f"some ranks used '{self._names[differing[0]]}' in this window and others did not: DeepSpeed's stages "
                "1 to 3 reduce what each rank used, in the order of use. Let every rank use it (times 0), or use "
                "stage 0"
            )

    def check_last(self) -> None:
        """Where DeepSpeed takes gradients only from the window's last backward.

        Raises:
            RuntimeError: the last backward left a parameter out that an earlier one used.
        """
        if self._backward != self._window:
            missing = self._names[min(self._window - self._backward)]
            raise RuntimeError(
                f"the window's last backward did not use '{missing}', and an earlier one did: with offload, and in "
                "stage 1 with overlap_comm, DeepSpeed would lose its gradient. Use stage 2 without offload"
            )

    def unused(self, *, everywhere: bool) -> frozenset[str]:
        """Names of the parameters without a gradient in this window, here or on every rank (collective)."""
        used = self._window
        if everywhere and self._channel is not None:
            used = set(self._flags(used, "reduce")[0].nonzero().view(-1).tolist())
        return frozenset(name for number, name in enumerate(self._names) if number not in used)

    def _flags(self, numbers: set[int], hook: str) -> Tensor:
        """bool [2, parameters]: whether any rank has it in ``numbers``, and whether any has not. 2 bytes each."""
        assert self._channel is not None
        flags = torch.zeros(2, len(self._names), dtype=torch.uint8)
        flags[1] = 1
        for number in numbers:
            flags[0, number], flags[1, number] = 1, 0
        both = flags.to(self._device)
        self._channel.all_reduce(both.view(-1), hook, op="max").wait()
        return both.cpu().bool()

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
