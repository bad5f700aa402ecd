"""Saved tensors wait in the host's memory: they leave behind the forward of their module and come back, one module
ahead, for its backward.

On CUDA both ways go over a stream of their own, from and to page-locked memory, of which torch takes a power of two for
each storage: up to twice the bytes. Each storage goes once, however many tensors see it. Parameters, what is small, and
inputs that need no gradient (which all layers share) stay where they are. On a CPU the way is a copy each time, in the
same order, so that everything but the streams runs there too.

Whoever writes into a saved tensor while it leaves may be faster than the copy. Backward refuses it then, as autograd
does without hooks, and so it refuses what was written into and stayed. A write through ``tensor.data`` raises no
version counter, and is seen neither here nor by autograd: what comes back may be from before it or from after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import Module

from camshaft_recompute.tally import Seen, Tally
from camshaft_recompute.trees import address, tensors
from camshaft_recompute.versions import Version

Place = tuple[int, int]
"""(stage, microbatch)."""


class Lane:
    """The way between a device and the host."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def away(self, flat: Tensor) -> tuple[Tensor, Any]:
        """Start to copy bytes ``flat`` to the host: the copy, and the event after which it is whole."""
        if self._stream is None:
            return flat.clone(), None
        host = _pinned(flat)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            host.copy_(flat, non_blocking=True)
            flat.record_stream(self._stream)  # its memory may go to somebody else only after that
        return host, self._stream.record_event()

    def back(self, host: Tensor) -> tuple[Tensor, Any]:
        """Start to copy ``host`` to the device; use the copy after the event."""
        if self._stream is None:
            return host.clone(), None
        with torch.cuda.stream(self._stream):
            flat = torch.empty(host.shape, dtype=host.dtype, device=self._device)
            flat.copy_(host, non_blocking=True)
        return flat, self._stream.record_event()

    def arrive(self, flat: Tensor, event: Any) -> None:
        """The current stream, which uses ``flat`` from now on, waits for it."""
        if event is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(event)
            flat.record_stream(current)


def _pinned(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)


class Parcel:
    """The bytes of one storage. They come back once; the last tensor that autograd lets go of frees them."""

    __slots__ = ("_host", "_lane", "_sent", "_there", "size")

    def __init__(self, storage: torch.UntypedStorage, device: torch.device, lane: Lane) -> None:
        flat = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
        self._lane, self.size = lane, flat.numel()
        host, self._sent = lane.away(flat)
        self._host: Tensor | None = host
        self._there: tuple[Tensor, Any] | None = None

    def fetch(self) -> None:
        """Start to bring it back."""
        if self._there is None:
            assert self._host is not None
            self._there = self._lane.back(self._host)
            if self._sent is None:
                self._host = None

    def open(self) -> Tensor:
        """The bytes, on the device."""
        self.fetch()
        assert self._there is not None
        flat, event = self._there
        self._lane.arrive(flat, event)
        self._there = flat, None
        return flat


class Ticket:
    """Stands for one saved tensor, which has left."""

    __slots__ = ("_load", "_parcel", "_version", "_view")

    def __init__(self, load: Load, parcel: Parcel, tensor: Tensor, version: Version) -> None:
        self._load, self._parcel, self._version = load, parcel, version
        self._view = tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()

    def open(self) -> Tensor:
        """The tensor as it was, with its strides; beside it the module before is sent for."""
        self._version.check(self._load.name)
        self._load.fetch()
        dtype, shape, stride, offset = self._view
        flat = self._parcel.open()
        made = torch.empty(0, dtype=dtype, device=flat.device)
        return made.set_(flat.untyped_storage(), offset, shape, stride)


class Stay:
    """Stands for one saved tensor, which is where it was."""

    __slots__ = ("_name", "_tensor", "_version")

    def __init__(self, name: str, tensor: Tensor) -> None:
        # Not what an operation made: autograd would hold its own graph in it, which no garbage collector ends.
        self._name, self._tensor = name, tensor if tensor.is_leaf else tensor.detach()
        self._version = Version(self._tensor)

    def open(self) -> Tensor:
        """The tensor."""
        self._version.check(self._name)
        return self._tensor


class Load:
    """All that one call of module ``name`` sent away."""

    def __init__(self, name: str, before: Load | None) -> None:
        self.name = name
        self.parcels: list[Parcel] = []
        self._before, self._asked = before, False

    def fetch(self) -> None:
        """Bring everything back, then what the call before this one sent."""
        if self._asked:
            return
        self._asked = True
        self._bring()
        if self._before is not None:
            self._before._bring()
            self._before = None

    def _bring(self) -> None:
        for parcel in self.parcels:
            parcel.fetch()
        self.parcels = []


class Hold:
    """What of a module's call leaves the device: hooks on saved tensors around its forward."""

    def __init__(self, load: Load, lane: Lane, stays: Iterable[Tensor], least: int, device: torch.device) -> None:
        self._load, self._lane, self._least, self._device = load, lane, least, device
        self._stays = {address(each) for each in stays}
        self._parcels: dict[int, tuple[Parcel, Version]] = {}
        self.bytes = 0
        """Bytes that have left."""
        self._alive: list[Tensor] = []
        """Until the forward is over: an address means one storage only while that lives."""

    def __enter__(self) -> Hold:
        self._hooks = saved_tensors_hooks(self._pack, _unpack)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        self._alive, self._stays = [], set()
        self._parcels = {}

    def _pack(self, tensor: Tensor) -> Ticket | Stay:
        place = address(tensor)
        whole = tensor.untyped_storage()
        used = tensor.numel() * tensor.element_size()
        apart = tensor.device != self._device or tensor.layout != torch.strided
        if apart or place in self._stays or whole.nbytes() < self._least or 2 * used < whole.nbytes():
            return Stay(self._load.name, tensor)
        known, version = self._parcels.get(place), Version(tensor).let_go()
        if known is None or not known[1].current:  # what was written into since is another parcel
            known = self._parcels[place] = Parcel(whole, tensor.device, self._lane), version
            self._load.parcels.append(known[0])
            self.bytes += known[0].size
            self._alive.append(tensor)
        return Ticket(self._load, known[0], tensor, version)


def _unpack(packed: Ticket | Stay) -> Tensor:
    return packed.open()


class Offloaded:
    """Module ``name``, whose saved tensors wait on the host."""

    def __init__(self, name: str, module: Module, device: torch.device, tally: Tally, least: int, line: Line) -> None:
        self.name, self.module, self.inner = name, module, module.forward
        self._own = vars(module).get("forward")
        self._device, self._tally, self._least, self._line = device, tally, least, line
        self.compiled = self._plain = False

    def install(self) -> None:
        """Take the place of the module's forward."""
        self.module.forward = self.forward

    def close(self) -> None:
        """Give it back; where another plugin has put its own around it, do nothing any more."""
        self._plain = True
        if vars(self.module).get("forward") == self.forward:
            del self.module.forward
            if self._own is not None:
                self.module.forward = self._own

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """The module's own; where gradients are wanted, what autograd saves goes to the host."""
        if self._plain or not torch.is_grad_enabled():
            return self.inner(*arguments, **named)
        shared = [each for each in tensors([arguments, named]) if not each.requires_grad]
        stays = (*self.module.parameters(), *self.module.buffers(), *shared)
        hold = Hold(self._line.next(self.name), self._line.lane, stays, self._least, self._device)
        with hold:
            made = self.inner(*arguments, **named)
            if self._tally.counts:
                self._tally.calls.append(self._seen(hold))
        return made

    def _seen(self, hold: Hold) -> Seen:
        seen = self._tally.seen(self.name)
        seen.dropped = hold.bytes
        return seen


class Line:
    """The order in which modules send, of each microbatch and stage: backward comes the other way."""

    def __init__(self, device: torch.device, place: Callable[[], Place]) -> None:
        self.lane, self._place = Lane(device), place
        self._last: tuple[Place, Load] | None = None

    def next(self, name: str) -> Load:
        """For the call of module ``name`` that begins."""
        place = self._place()
        before = self._last[1] if self._last is not None and self._last[0] == place else None
        load = Load(name, before)
        self._last = place, load
        return load
