"""What a forward depends on beside its inputs: autocast and the states of random number generators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

Generators = dict[str, Tensor]
"""State of the default generator of each kind of device; on the CPU, whatever they are of."""


def generators(device: torch.device) -> Generators:
    """States of the generators that operations on ``device`` may draw from; reading them waits for nothing."""
    states = {"cpu": torch.get_rng_state()}
    if device.type not in ("cpu", "meta"):
        states[device.type] = torch.get_device_module(device).get_rng_state(device)
    return states


def _set(states: Generators, device: torch.device) -> None:
    for kind, value in states.items():
        if kind == "cpu":
            torch.set_rng_state(value)
        else:
            torch.get_device_module(device).set_rng_state(value, device)


class Ambient:
    """Autocast and generators as they are now, to be had again later."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        kinds = dict.fromkeys(("cpu", device.type)) if device.type != "meta" else {"cpu": None}
        self._casts: list[dict[str, Any]] = [
            {
                "device_type": kind,
                "enabled": torch.is_autocast_enabled(kind),
                "dtype": torch.get_autocast_dtype(kind),
                "cache_enabled": torch.is_autocast_cache_enabled(),
            }
            for kind in kinds
        ]
        self._before: Generators | None = generators(device)

    def settle(self) -> None:
        """The forward is over: where it drew no number, none will be drawn again, and no state is held."""
        assert self._before is not None
        now = generators(self._device)
        if all(torch.equal(value, now[kind]) for kind, value in self._before.items()):
            self._before = None

    @property
    def draws(self) -> bool:
        """Whether the forward drew random numbers."""
        return self._before is not None

    @contextmanager
    def restored(self) -> Iterator[None]:
        """As it was; what was there before comes back behind it."""
        with ExitStack() as stack:
            for cast in self._casts:
                stack.enter_context(torch.autocast(**cast))
            if self._before is None:
                yield
                return
            now = generators(self._device)
            _set(self._before, self._device)
            try:
                yield
            finally:
                _set(now, self._device)
