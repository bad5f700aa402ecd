"""Which parameters a window used. DeepSpeed makes zeros of a gradient that is not there; an optimizer moves on them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Module

from camshaft.comm import Channel


class Usage:
    """Notes each gradient that backward makes, and compares the ranks' notes once a window.

    ``alike``: DeepSpeed needs all ranks to use the same parameters. ``every_backward``: it loses gradients of
    parameters that the window's last backward does not use.
    """

    def __init__(self, model: Module, channel: Channel | None, *, alike: bool, every_backward: bool) -> None:
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._names = [name for name, _ in trained]
        self._channel = channel
        self._device = trained[0][1].device
        self._alike, self._every_backward = alike, every_backward
        self._window: set[int] = set()
        self._last: set[int] = set()
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._note(number))  # type: ignore[no-untyped-call]
            for number, (_, parameter) in enumerate(trained)
        ]

    def _note(self, number: int) -> Callable[[Tensor], None]:
        def note(_: Tensor) -> None:
            self._window.add(number)
            self._last.add(number)

        return note

    def begin(self) -> None:
        """A backward begins."""
        self._last.clear()

    def settle(self) -> frozenset[str]:
        """Names of the parameters without a gradient on any rank in this window.

        Raises:
            RuntimeError: ranks used different parameters, or the last backward left one out that another used.
        """
        used = self._compare()
        if self._every_backward and self._last != self._window:
            missing = self._names[min(self._window - self._last)]
            raise RuntimeError(
                f"the window's last backward did not use '{missing}', and an earlier one did: with offload, and in "
                "stage 1 with overlap_comm, DeepSpeed would lose its gradient. Use stage 2 without offload"
            )
        return frozenset(name for number, name in enumerate(self._names) if number not in used)

    def _compare(self) -> set[int]:
        """What any rank used. Collective: 2 bytes a parameter."""
        if self._channel is None or self._channel.size == 1:
            return self._window
        flags = torch.zeros(2, len(self._names), dtype=torch.uint8)
        flags[1] = 1
        for number in self._window:
            flags[0, number], flags[1, number] = 1, 0
        both = flags.to(self._device)
        self._channel.all_reduce(both, "reduce", op="max").wait()
        used, left_out = both.cpu().bool()
        differing = (used & left_out).nonzero().view(-1).tolist()
        if differing and self._alike:
            raise RuntimeError(
                f"some ranks used '{self._names[differing[0]]}' in this window and others did not: DeepSpeed's stages "
                "1 to 3 reduce what each rank used, in the order of use. Let every rank use it (times 0), or use "
                "stage 0"
            )
        return set(used.nonzero().view(-1).tolist())

    def forget(self) -> None:
        """The next window begins."""
        self._window.clear()
        self._last.clear()

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
