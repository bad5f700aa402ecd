"""Delayed scaling (Micikevicius et al., arXiv:2209.05433): scales follow from the largest magnitudes of past windows.

Each layer has three tensors with a scale: input, weight, gradient of the output. Their amax over a window's
microbatches is one row of a ring of ``history`` windows, reduced over all ranks with the same layers by one maximum of
12 bytes a layer; the scale of the next window is that of the ring's maximum. Until a tensor has been seen it is scaled
as it is now. A value above what the ring has seen saturates, and is in the ring from then on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from camshaft_precision.scaled import E4M3, E5M2, scale_of

if TYPE_CHECKING:
    from camshaft.comm import Channel

PLACES = {"input": 0, "weight": 1, "gradient": 2}


class Meter:
    """Views of one layer's three amax of this window, and of the scales that it uses; 0: not seen yet."""

    def __init__(self, largest: Tensor, scales: Tensor) -> None:
        self._largest, self._scales = largest, scales

    def note(self, what: str, found: Tensor) -> None:
        """Remember an amax, a scalar. NaN and inf are remembered as well: the window's result has them."""
        place = self._largest[PLACES[what]]
        torch.maximum(place, found, out=place)

    def scale(self, what: str, now: Tensor) -> Tensor:
        """The scale of past windows, or ``now``."""
        past = self._scales[PLACES[what]]
        return torch.where(past > 0, past, now)


class Ring:
    """Amax of the last ``history`` windows, fp32 [history, layers, 3], and the scales that follow."""

    def __init__(self, names: Sequence[str], history: int, device: torch.device, channel: Channel | None) -> None:
        self.names, self._channel = list(names), channel
        self.history = torch.zeros(history, len(names), 3, device=device)
        self._largest = torch.zeros(len(names), 3, device=device)
        self.scales = torch.zeros(len(names), 3, device=device)
        self._place = 0

    def meter(self, name: str) -> Meter:
        """That of layer ``name``."""
        index = self.names.index(name)
        return Meter(self._largest[index], self.scales[index])

    def turn(self) -> None:
        """A window is over: its amax are the newest row, on all ranks alike. Collective; no wait for the device."""
        if not self.names:
            return
        if self._channel is not None:
            self._channel.all_reduce(self._largest, "post_reduce", op="max").wait()
        # A window without finite values tells nothing of the next one's.
        self.history[self._place] = torch.where(self._largest.isfinite(), self._largest, 0.0)
        self._place = (self._place + 1) % len(self.history)
        self._largest.zero_()
        self._settle()

    def _settle(self) -> None:
        largest = self.history.amax(0)
        products = torch.stack((*(scale_of(largest[:, at], E4M3) for at in (0, 1)), scale_of(largest[:, 2], E5M2)), 1)
        self.scales.copy_(torch.where(largest > 0, products, 0.0))

    def state_dict(self) -> Mapping[str, Any]:
        """Every layer's rows, oldest first."""
        rows = self.history.roll(-self._place, 0).transpose(0, 1).tolist()
        return dict(zip(self.names, rows, strict=True))

    def load_state_dict(self, entries: Mapping[str, Any]) -> None:
        """Take the rows of the layers that are here; a shorter or longer ring keeps the newest."""
        self.history.zero_()
        self._place = 0
        for index, name in enumerate(self.names):
            rows = torch.tensor(entries.get(name, []), dtype=torch.float32, device=self.history.device)
            rows = rows[-len(self.history) :]
            if len(rows):
                self.history[-len(rows) :, index] = rows
        self._settle()
