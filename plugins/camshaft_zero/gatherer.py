"""Stage 3: parameters are gathered just before their use and freed after it, ahead of time in the order of use.

Units take turns in a few buffers (slots): a unit always has the same one, because what autograd saves for backward are
views of it, which are right again once the unit is gathered again. While a unit is freed its parameters have no memory
and read as NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module

from camshaft_zero import grouping
from camshaft_zero.grid import Grid
from camshaft_zero.seats import Order, Place, Seat, Slot, Visit, tensors_of, watch_inputs
from camshaft_zero.storage import Unit

if TYPE_CHECKING:
    from camshaft.state import State


class Gatherer:
    """Gathers and frees the parameters of all units of a model around the forwards and backwards of its modules."""

    def __init__(self, state: State, units: Sequence[Unit], grid: Grid, *, reshard: bool, prefetch: int) -> None:
        self._state, self._grid, self._reshard, self._prefetch = state, grid, reshard, prefetch
        self.over: Callable[[Unit], None] = lambda unit: None
        """Told when the backward of a unit is over for a microbatch: in one order on all ranks, whatever each used."""
        self._seats = self._place(units)
        self._by_unit = {seat.unit: seat for seat in self._seats}
        self._staged = len({stage for unit in units for stage in unit.stages}) > 1
        self._orders: dict[int, Order] = {}
        """Of each pipeline stage, learned in the first window."""
        self._kept: set[Seat] = set()
        self._open: list[Visit] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        for module, seats in self._modules().items():
            self._watch(module, seats)

    def _place(self, units: Sequence[Unit]) -> list[Seat]:
        """Seats in slots; units that train and frozen ones, whose groups are apart, share none."""
        slots: dict[object, Slot] = {}
        seats = []
        for trains in (True, False):
            members = [unit for unit in units if unit.trains == trains]
            keys = grouping.slots([unit.group for unit in members], self._prefetch, self._reshard)
            seats += [
                Seat(unit, slots.setdefault((trains, key), Slot())) for unit, key in zip(members, keys, strict=True)
            ]
        for slot in slots.values():
            like = units[0].master
            slot.buffer = torch.zeros(slot.size, dtype=units[0].shard.dtype, device=like.device)  # type: ignore[union-attr]
        for seat in seats:
            seat.seat()
        return seats

    @property
    def buffer_bytes(self) -> int:
        """Bytes of all slots."""
        slots = {id(seat.slot): seat.slot.buffer for seat in self._seats}
        return sum(buffer.numel() * buffer.element_size() for buffer in slots.values() if buffer is not None)

    def _modules(self) -> dict[Module, list[Seat]]:
        found: dict[Module, list[Seat]] = {}
        for seat in self._seats:
            for module in seat.unit.modules:
                found.setdefault(module, []).append(seat)
        return found

    def _watch(self, module: Module, seats: list[Seat]) -> None:
        def before(_: Module, arguments: Any, named: Any) -> Any:
            inputs: Any = (arguments, named)
            for seat in self._used(seats):
                modules = seat.unit.modules
                visit = Visit(seat, self._place_now(), module is modules[0], module is modules[-1])
                inputs = self._enter(visit, inputs)
            return inputs

        def after(_: Module, __: Any, output: Any) -> None:
            for seat in self._used(seats):
                self._leave(seat, output)

        self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        # Always: recomputation ends a forward by an exception, as soon as it has what backward asks for.
        self._handles.append(module.register_forward_hook(after, always_call=True))

    def _used(self, seats: list[Seat]) -> list[Seat]:
        """Those of a module's seats that the stage uses; an evaluation, of which nobody tells the stage, has all."""
        if not self._staged or not torch.is_grad_enabled():
            return seats
        return [seat for seat in seats if self._state.stage in seat.unit.stages]

    def _place_now(self) -> Place:
        return self._state.stage, self._state.microbatch

    def _order_of(self, place: Place) -> Order:
        return self._orders.setdefault(place[0], Order())

    def _enter(self, visit: Visit, inputs: Any) -> Any:
        seat = visit.seat
        self._close_others(visit.place)
        seat.visits.append(visit)
        self.gather(seat)
        seat.users += 1
        if seat.backwards:  # recomputation inside a backward, which has its own hooks already
            return inputs
        order = self._order_of(visit.place)
        if order.learning and torch.is_grad_enabled() and seat not in order.seats:
            order.seats.append(seat)
        if not order.learning:
            self._fetch_beside(visit, 1)
        if torch.is_grad_enabled():
            inputs, visit.counted = watch_inputs(inputs, lambda: self._ended(visit))
        return inputs

    def _close_others(self, place: Place) -> None:
        """Visits whose backward was one of inputs alone, and that no input's gradient told to be over."""
        if self._open and self._open[0].place != place:
            self._close_every(self._open)

    def _ended(self, visit: Visit) -> None:
        if visit.opened and not visit.closed:
            self._close(visit)
            self._passed(visit)

    def _leave(self, seat: Seat, output: Any) -> None:
        seat.users -= 1
        visit = seat.visits.pop()
        if seat.backwards:
            return
        if torch.is_grad_enabled():
            outputs = [tensor for tensor in tensors_of(output) if tensor.grad_fn is not None]
            seat.due[visit.place] += bool(outputs)
            for tensor in outputs:
                tensor.register_hook(self._opens(visit))  # type: ignore[no-untyped-call]
            if self._order_of(visit.place).learning:
                self._order_of(visit.place).left.append(seat)
            if not self._reshard or seat in self._kept:
                return
        if visit.last and not seat.users:
            self.free(seat)

    def _opens(self, visit: Visit) -> Callable[[Tensor], None]:
        def opens(_: Tensor) -> None:
            if visit.opened:
                return
            visit.opened = True
            self._close_others(visit.place)
            self._learned(visit.place)
            seat = visit.seat
            self.gather(seat)
            seat.users += 1
            seat.backwards += 1
            self._open.append(visit)
            self._fetch_beside(visit, -1)

        return opens

    def _learned(self, place: Place) -> None:
        """The first backward of a stage begins: its order is known, and what was used last is kept from now on."""
        order = self._order_of(place)
        if order.learning:
            self._kept |= order.settle()

    def _passed(self, visit: Visit) -> None:
        """Backward has left a module; tell of its unit if that was the last time in this microbatch."""
        seat = visit.seat
        seat.due[visit.place] -= 1
        if not seat.due[visit.place]:
            self.over(seat.unit)

    def _close(self, visit: Visit) -> None:
        visit.closed = True
        self._open.remove(visit)
        seat = visit.seat
        seat.users -= 1
        seat.backwards -= 1
        if visit.first and not seat.users:
            self.free(seat)

    def _fetch_beside(self, visit: Visit, step: int) -> None:
        for other in self._order_of(visit.place).beside(visit.seat, self._prefetch, step):
            if not other.held:
                self._fetch(other)

    def _fetch(self, seat: Seat) -> bool:
        """Start to gather; False when another unit needs the slot now."""
        occupant = seat.slot.owner
        if occupant is not None and occupant is not seat and occupant.held:
            if occupant.users or occupant.pending is not None:
                return False
            self.free(occupant)
        seat.slot.owner, seat.held = seat, True
        assert seat.flat is not None and seat.unit.shard is not None
        if self._grid.inner is None:
            seat.flat.copy_(seat.unit.shard)
        else:
            seat.pending = self._grid.inner.all_gather(seat.flat, seat.unit.shard, "gather")
        return True

    def gather(self, seat: Seat) -> None:
        """Return when the parameters can be used.

        Raises:
            RuntimeError: another unit that is in use has the same buffer.
        """
        if not seat.held:
            occupant = seat.slot.owner
            if occupant is not None and occupant.pending is not None and not occupant.users:
                self._arrive(occupant)  # it was fetched ahead and is not needed yet
            elif occupant is not None and occupant.finished:
                self._close_every(each for each in self._open if each.seat is occupant)
            if not self._fetch(seat):
                other = "another unit" if occupant is None else f"'{occupant.unit.name}'"
                raise RuntimeError(
                    f"'{seat.unit.name or 'the model'}' is needed while {other} still is, and both use one buffer: the "
                    "modules do not run one after the other. Set plugins.zero.reshard_after_forward=false, or "
                    "plugins.zero.provider=torch"
                )
        self._arrive(seat)

    def _arrive(self, seat: Seat) -> None:
        if seat.pending is not None:
            seat.pending.wait()
            seat.pending = None
        seat.show()

    def free(self, seat: Seat) -> None:
        """Let go of the parameters."""
        if seat.pending is not None:
            seat.pending.wait()
            seat.pending = None
        if seat.held:
            seat.held = False
            seat.hide()

    def completed(self, unit: Unit) -> None:
        """All gradients of ``unit`` have come: where no input tells the end of its backward, others may have its slot.

        It is not freed now: ranks that use other parameters would fetch ahead in another order.
        """
        seat = self._by_unit[unit]
        seat.finished = not any(visit.counted for visit in self._open if visit.seat is seat)

    def _close_every(self, visits: Iterable[Visit]) -> None:
        for visit in list(visits):
            self._close(visit)

    def end_backward(self) -> None:
        """Backward is over for everything, also where neither inputs nor gradients told so."""
        self._close_every(self._open)
        for seat in self._seats:
            seat.due.pop(self._place_now(), None)
            seat.finished = False

    def forget(self) -> None:
        """Free everything: the parameters have changed, or are about to."""
        for seat in self._seats:
            self.free(seat)

    def close(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
