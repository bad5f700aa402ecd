"""What recomputation saves and costs, counted in the first microbatch that runs, and told at the end of its window."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import Module

from camshaft_recompute.trees import address, storage_bytes
from camshaft_recompute.watching import Sight

if TYPE_CHECKING:
    from camshaft.state import State


@dataclass(slots=True)
class Seen:
    """One call of one module."""

    name: str
    stage: int = 0
    dropped: int = 0
    """Bytes that autograd would have held and that now nobody holds, before kept results."""
    inputs: int = 0
    """Bytes of inputs that are held, and that no call before this one held."""
    extra: int = 0
    """Those of them that autograd would not have held."""
    kept: int = 0
    """Bytes of results that are kept."""
    first: Sight = field(default_factory=Sight)
    again: Sight = field(default_factory=Sight)


@dataclass
class Tally:
    """Collects calls while ``open``."""

    state: State | None = None
    open: bool = True
    calls: list[Seen] = field(default_factory=list)
    _inputs: dict[int, weakref.ref[Tensor]] = field(default_factory=dict)

    @property
    def counts(self) -> bool:
        """Whether the forward that runs is of the first microbatch of the first window."""
        return self.open and self.state is not None and self.state.microbatch == 0

    def begin(self) -> None:
        """A forward starts: one that was given up, because it did not fit, does not count."""
        if self.counts:
            assert self.state is not None
            self.calls = [each for each in self.calls if each.stage != self.state.stage]
            self._inputs.clear()

    def seen(self, name: str) -> Seen:
        """For a call of module ``name`` that begins."""
        assert self.state is not None
        return Seen(name, self.state.stage)

    def add(self, seen: Seen, saved: Sequence[Tensor], inputs: Sequence[Tensor], own: Module, kept: int) -> None:
        """Count a call that saved tensors ``saved``; those must all still be alive."""
        held = storage_bytes(saved)
        for each in (*own.parameters(), *own.buffers()):
            held.pop(address(each), None)
        places = {address(each) for each in inputs}
        fresh = storage_bytes([each for each in inputs if self._is_new(each)])
        seen.dropped = sum(size for place, size in held.items() if place not in places)
        seen.inputs = sum(fresh.values())
        seen.extra = sum(size for place, size in fresh.items() if place not in held)
        seen.kept = kept
        self.calls.append(seen)

    def _is_new(self, tensor: Tensor) -> bool:
        known = self._inputs.get(id(tensor))
        if known is not None and known() is tensor:
            return False
        self._inputs[id(tensor)] = weakref.ref(tensor)
        return True

    @property
    def saved_bytes(self) -> int:
        """Of one microbatch on this rank."""
        return sum(each.dropped - each.kept - each.extra for each in self.calls)

    @property
    def kept_bytes(self) -> int:
        """Of one microbatch on this rank: inputs and kept results."""
        return sum(each.inputs + each.kept for each in self.calls)

    @property
    def extra_flops(self) -> float:
        """Floating-point operations of products and attention that run a second time in one microbatch."""
        return sum(each.again.flops for each in self.calls)

    @property
    def flops(self) -> float:
        """Those of the first time."""
        return sum(each.first.flops for each in self.calls)
