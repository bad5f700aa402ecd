"""What operations of a module's forward make and cost, seen by a dispatch mode around it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from camshaft_recompute.kinds import Operation, draws, makes, name_of, writes
from camshaft_recompute.trees import address, storage_bytes, tensors

Clock = Callable[[], Callable[[], float]]
"""Starts to measure; what it returns ends that, and tells seconds once the device is through."""


@dataclass(slots=True)
class Done:
    """One operation whose result could be kept."""

    name: str
    bytes: int
    flops: float
    saved: int
    """Tensors that autograd had saved when it was done."""
    seconds: Callable[[], float]
    spoiled: bool = False
    """Somebody wrote into the result, or a collective may have: it cannot be kept."""


@dataclass(slots=True)
class Sight:
    """All that was seen of one run."""

    flops: float = 0.0
    """Of matrix products and attention."""
    calls: int = 0
    """Operations that are more than another view of the same memory."""
    done: list[Done] = field(default_factory=list)
    saved: int = 0
    """Tensors that autograd saved in all."""


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Changes nothing. ``saved`` tells how many tensors autograd has saved so far."""

    def __init__(self, device: torch.device, saved: Callable[[], int], sight: Sight) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._saved, self._sight = saved, sight
        self._clock: Clock = _host if device.type != "cuda" else partial(_events, device)
        self._makers: dict[int, Done] = {}
        """Address to who made what is there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        stop = self._clock()
        result = func(*args, **kwargs)
        seconds, sight = stop(), self._sight
        flops = _flops(func, args, kwargs, result)
        sight.flops += flops
        if writes(func):
            self._spoil(tensors([args, kwargs]))
        elif makes(func):
            sight.calls += 1
            if not draws(func, args, kwargs):
                memory = storage_bytes(tensors(result))
                done = Done(name_of(func), sum(memory.values()), flops, self._saved(), _known(seconds))
                sight.done.append(done)
                self._makers |= dict.fromkeys(memory, done)
        sight.saved = self._saved()
        return result

    def _spoil(self, written: Iterable[Tensor]) -> None:
        for each in written:
            maker = self._makers.get(address(each))
            if maker is not None:
                maker.spoiled = True


def _known(seconds: float | Callable[[], float]) -> Callable[[], float]:
    return seconds if callable(seconds) else lambda: seconds


def _host() -> Callable[[], Any]:
    start = time.perf_counter()
    return lambda: time.perf_counter() - start


def _events(device: torch.device) -> Callable[[], Any]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record(torch.cuda.current_stream(device))

    def stop() -> Callable[[], float]:
        end.record(torch.cuda.current_stream(device))
        return lambda: float(start.elapsed_time(end)) * 1e-3

    return stop


def _flops(operation: Operation, args: Any, kwargs: Any, result: Any) -> float:
    """Of products by torch's own formulas, and of attention on any device; else 0."""
    if name_of(operation).startswith("aten._scaled_dot_product_"):
        return _attention(*(each.shape for each in args[:3]))
    formula = flop_registry.get(getattr(operation, "overloadpacket", None))
    return 0.0 if formula is None else float(formula(*args, **kwargs, out_val=result))


def _attention(query: torch.Size, key: torch.Size, value: torch.Size) -> float:
    """Both products for every query head, whether or not several of them share a key head: torch 2.11's own formula
    refuses those that do.
    """
    batch, heads, rows, width = query
    return float(2 * batch * heads * rows * key[-2] * (width + value[-1]))
