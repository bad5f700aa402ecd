"""Gradients: collected in a flat buffer a unit, summed over the data ranks while backward goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from camshaft.comm import Pending
from camshaft.stages import strange_stage
from camshaft.state import State
from camshaft_zero.costs import UNDER_WAY
from camshaft_zero.filling import Filling
from camshaft_zero.grid import Grid
from camshaft_zero.layout import Member
from camshaft_zero.pool import Pool, Room, budget_of
from camshaft_zero.storage import Unit

AT_ONCE = 1 << 14
"""Elements from which a gradient is copied as soon as it is there, while it is in the processor's cache."""


class Reducer:
    """Sums gradients over the ranks, and gives each part the gradient of what it holds.

    With ``each`` a unit's gradients are summed after every microbatch and only this rank's stretch is kept; otherwise
    the full gradients stay until their sum in the last backward of the unit's pipeline stage. From ``release`` to the
    first backward of a window none have memory, so that none is beside the activations of a whole forward.

    Sums start in one order on all ranks, whatever each rank used; with ``paced`` also at the same places between
    gathers: where ``over`` is told so, not where gradients come. A backward touches the units of its own stage alone,
    so that stages may take turns.
    """

    def __init__(
        self, state: State, grid: Grid, units: Sequence[Unit], *, each: bool, overlap: bool, paced: bool = False
    ) -> None:
        self._state, self._grid, self._policy = state, grid, state.world.policy
        self._each, self._overlap, self._paced = each and not grid.alone, overlap, paced
        # Of one microbatch, or of the sum over all of them.
        self._dtype = self._policy.param if self._each else self._policy.kept
        self._fillings = [Filling(unit) for unit in units]
        self._by_unit = {filling.unit: filling for filling in self._fillings}
        # Until the first backward shows it: units of modules are listed as forward goes, buckets as backward does.
        self._order = self._fillings[::-1] if paced else list(self._fillings)
        self._seen: list[Filling] | None = []
        self._turn: list[Filling] | None = None
        """Units whose sums the backward that runs starts, in order; None until it is asked for."""
        self._next = 0
        """Place in it."""
        self._done: set[int] = set()
        """Stages whose last backward of this window is over."""
        self._staged = len({stage for unit in units for stage in unit.stages}) > 1
        self._started: list[tuple[Filling, Pending | None, Tensor, Room | None]] = []
        self._carried = 0
        """Sums under way that an earlier backward started."""
        sizes = [unit.layout.size for unit in units]
        device = state.world.device
        self._pool = Pool(budget_of(sizes), lambda: Room(max(sizes), self._dtype, device), self._settle_oldest)
        count = sum(filling.expected for filling in self._fillings)
        self._flags = torch.ones(count, dtype=torch.int32, device=state.world.device)
        self._flags_pending: Pending | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._batched: list[tuple[Filling, int, Member]] = []
        self.completed: Callable[[Unit], None] = lambda unit: None
        """Told when all gradients of a unit have come."""
        for filling in self._fillings:
            for index, member in enumerate(filling.unit.layout.members):
                self._watch(filling, index, member)

    def _take(self, filling: Filling) -> None:
        """Give ``filling`` a buffer."""
        self._settle_carried()
        size = filling.unit.layout.size
        if self._each:
            filling.move_into(self._pool.take(size))
        else:
            filling.have(torch.empty(size, dtype=self._dtype, device=self._state.world.device))

    def _settle_carried(self) -> None:
        """Sums of an earlier backward had a forward to finish in: their buffers are free now."""
        while self._carried and self._settle_oldest():
            pass

    def end_forward(self) -> None:
        """When a forward is over or about to be: keep no memory of an earlier backward beside its activations."""
        if self._carried:
            self._settle_carried()
            self._let_go()

    def _watch(self, filling: Filling, index: int, member: Member) -> None:
        member.parameter.grad_dtype = self._dtype
        on_host = self._state.world.device.type == "cpu"
        if self._grid.alone and not (on_host and member.size >= AT_ONCE):
            self._batched.append((filling, index, member))
            return
        hook = self._hook(filling, index, member)
        self._handles.append(member.parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]

    def _hook(self, filling: Filling, index: int, member: Member) -> Callable[[Tensor], None]:
        alone, each, stages = self._grid.alone, self._each, filling.unit.stages

        def ready(parameter: Tensor) -> None:
            if self._state.stage not in stages:
                raise strange_stage(member.name, self._state.stage, stages)
            if filling.complete or (each and filling.fresh[index]):
                raise self._twice(member.name)
            if filling.buffer is None:
                self._take(filling)
            if each:
                filling.views[index].copy_(parameter.grad)  # type: ignore[arg-type]  # it was just accumulated
                parameter.grad = None
            elif parameter.grad is not filling.views[index]:
                filling.views[index].copy_(parameter.grad)  # type: ignore[arg-type]
                parameter.grad = filling.views[index]
            filling.fresh[index] = filling.used[index] = True
            if alone:
                return
            filling.ready += 1
            if filling.ready > filling.expected:
                raise self._twice(member.name)
            if filling.ready == filling.expected:
                self._complete(filling)

        return ready

    def _twice(self, name: str) -> RuntimeError:
        return RuntimeError(
            f"the gradient of '{name}' came twice, or after the backward of its unit was over: a module of another "
            "unit uses this parameter, or backward made some gradient twice, as reentrant activation checkpointing "
            "does with a shared parameter (use use_reentrant=False)"
        )

    def _complete(self, filling: Filling) -> None:
        self.completed(filling.unit)
        if not self._paced:
            self._over(filling)

    def over(self, unit: Unit) -> None:
        """The backward of ``unit`` is over for this microbatch, on all ranks alike.

        One of inputs alone brought no gradients: those come in a backward that needs no parameters, and tells of none.
        """
        if unit in self._by_unit and not self._state.inputs_only:
            self._over(self._by_unit[unit])

    def _over(self, filling: Filling) -> None:
        if self._seen is not None:
            self._seen.append(filling)
        if self._each or self._closes(filling):
            filling.complete = True
            if self._overlap or self._each:
                turn = self._units_in_turn()
                while self._next < len(turn) and turn[self._next].complete:
                    self._start(turn[self._next])
                    self._next += 1
                    if not self._overlap:
                        self._settle_oldest()

    def _closes(self, filling: Filling) -> bool:
        """Whether the backward that runs is the window's last that brings gradients of this unit."""
        state = self._state
        return state.final_backward and filling.unit.stages <= self._done | {state.stage}

    def _units_in_turn(self) -> list[Filling]:
        if self._turn is None:
            stage = self._state.stage
            own = [filling for filling in self._order if stage in filling.unit.stages]
            self._turn = own if self._each else [filling for filling in own if self._closes(filling)]
        return self._turn

    def _start(self, filling: Filling) -> None:
        """Begin the sum of one unit over the ranks that divide it."""
        if filling.buffer is None:
            self._take(filling)
        source, unit, borrowed = filling.source(), filling.unit, None
        if self._each:  # the next microbatch may fill this unit before the sum is there
            borrowed = filling.move_out()
        while len(self._started) >= UNDER_WAY and self._settle_oldest():  # each takes memory to receive into
            pass
        chunk, pending = source, None
        if self._grid.inner is not None:
            source = source.to(self._policy.reduce)
            # Not into the buffer's own stretch: the rest of it is of no use once the sum is there.
            chunk = source.new_empty(unit.layout.size // self._grid.ranks)
            pending = self._grid.inner.reduce_scatter(chunk, source, "reduce")
        self._started.append((filling, pending, chunk, borrowed))

    def _settle_oldest(self) -> bool:
        """Wait for the oldest sum and put its buffer back; False when none is under way."""
        if not self._started:
            return False
        filling, pending, chunk, borrowed = self._started.pop(0)
        self._carried = max(0, self._carried - 1)
        if pending is not None:
            pending.wait()
        if borrowed is not None:
            self._add(filling, chunk)
            self._pool.give(borrowed)
        else:
            # The sum over copies is one of unrounded sums.
            filling.total = chunk if self._grid.outer is not None else chunk.to(self._policy.kept)
            if pending is not None:
                filling.drop()
        return True

    def _add(self, filling: Filling, chunk: Tensor) -> None:
        """``chunk`` is a microbatch's sum."""
        if filling.total is None:
            whole = self._grid.inner is None  # a view of what other units are about to use
            filling.total = chunk.to(self._policy.kept, copy=whole)
        else:
            filling.total += chunk

    def end_backward(self) -> None:
        """After each backward: take what no hook took, and sum the units of its stage that did not fill up."""
        state = self._state
        self._take_batched()
        for filling in self._units_in_turn()[self._next :]:
            self._start(filling)
        self._turn, self._next = None, 0
        for filling in self._fillings:
            if state.stage in filling.unit.stages:
                filling.ready = 0
                if self._each:
                    filling.complete = False
                    filling.fresh = [False] * filling.expected
        # Between stages' backwards there may be no forward to finish in: then only a buffer that lacks is waited for.
        self._carried = 0 if self._staged else len(self._started)
        if state.final_backward:
            self._done.add(state.stage)
        if state.last_backward:
            self._start_flags()

    def _take_batched(self) -> None:
        views, fresh = [], []
        for filling, index, member in self._batched:
            gradient = member.parameter.grad
            if gradient is not None and filling.buffer is None:
                self._take(filling)
            if gradient is not None and gradient is not filling.views[index]:
                views.append(filling.views[index])
                fresh.append(gradient)
                member.parameter.grad = filling.views[index]
                filling.fresh[index] = filling.used[index] = True
        if fresh:
            torch._foreach_copy_(views, fresh)

    def _start_flags(self) -> None:
        """Begin to ask whether a parameter that this rank did not use was used by another."""
        if self._grid.everyone is None or not self._fillings:
            return
        self._flags.fill_(1)
        for index, _ in self._missing():
            self._flags[index] = 0
        self._flags_pending = self._grid.everyone.all_reduce(self._flags, "reduce", op="max")

    def _missing(self) -> Iterator[tuple[int, str]]:
        """Place among the flags, and name, of each parameter that this rank had no gradient of in this window."""
        first = 0
        for filling in self._fillings:
            if not all(filling.used):
                for index, used in enumerate(filling.used):
                    if not used:
                        yield first + index, filling.unit.layout.members[index].name
            first += filling.expected

    def finish(self) -> set[str]:
        """Wait until every sum is there; names of parameters that no rank used in this window."""
        while self._settle_oldest():
            pass
        self._sum_copies()
        self._let_go()
        return self._unused()

    def _let_go(self) -> None:
        """No memory stays from backward to backward that a forward could use."""
        self._pool.clear()
        for line in (self._grid.inner, self._grid.outer):
            if line is not None:
                line.trim()

    def _sum_copies(self) -> None:
        """Sum each stretch over the ranks that hold copies of it."""
        outer = self._grid.outer
        if outer is None:
            return
        under_way: list[tuple[Filling, Pending, Tensor]] = []
        for filling in self._fillings:
            assert filling.total is not None
            if len(under_way) == UNDER_WAY:
                self._take_copies(*under_way.pop(0))
            wide = filling.total.to(self._policy.reduce)
            if self._grid.divided:
                size = wide.numel() // self._grid.slices
                own = wide.new_empty(size)
                under_way.append((filling, outer.reduce_scatter(own, wide, "reduce"), own))
            else:
                under_way.append((filling, outer.all_reduce(wide, "reduce"), wide))
        for each in under_way:
            self._take_copies(*each)

    def _take_copies(self, filling: Filling, pending: Pending, result: Tensor) -> None:
        pending.wait()
        if self._grid.divided:
            filling.drop()
        filling.total = result if result.dtype == self._policy.kept else self._keep(filling, result)

    def _unused(self) -> set[str]:
        if self._flags_pending is not None:
            self._flags_pending.wait()
            self._flags_pending = None
        missing = list(self._missing())
        if not missing or self._grid.everyone is None:
            return {name for _, name in missing}
        # Reading the flags waits for the device; only a parameter without a local gradient pays for it.
        found = self._flags.tolist()
        return {name for index, name in missing if not found[index]}

    def gradient(self, index: int) -> Tensor:
        """What was summed for the master values of a unit, in the master dtype; [end - begin] elements."""
        filling = self._fillings[index]
        assert filling.total is not None
        kept = filling.total
        if kept.dtype != self._policy.kept:
            kept = self._keep(filling, kept)
        filling.total = kept
        return kept if kept.dtype == filling.unit.master.dtype else kept.to(filling.unit.master.dtype)

    def _keep(self, filling: Filling, total: Tensor) -> Tensor:
        """Round the sum to the dtype that it is kept in, into the buffer's own stretch where that has the dtype."""
        buffer, unit = filling.buffer, filling.unit
        if buffer is None or buffer.dtype != self._policy.kept:
            return total.to(self._policy.kept)
        return buffer[unit.begin : unit.end].copy_(total)

    def release(self) -> None:
        """Drop all gradients; after the first window let every rank start sums in the first rank's order of
        backward.
        """
        self._done.clear()
        self._turn, self._next = None, 0
        for filling in self._fillings:
            filling.total, filling.complete, filling.ready = None, False, 0
            filling.fresh, filling.used = [False] * filling.expected, [False] * filling.expected
            filling.drop()
        if self._seen is not None:
            self._agree_on_order(self._seen)

    def _agree_on_order(self, seen: Sequence[Filling]) -> None:
        self._seen = None
        if self._grid.everyone is None or not self._fillings:
            return
        order = list(dict.fromkeys([*seen, *self._order]))
        indexes = torch.tensor(
            [self._fillings.index(filling) for filling in order], dtype=torch.int64, device=self._state.world.device
        )
        self._grid.everyone.broadcast(indexes, 0, "release").wait()
        self._order = [self._fillings[index] for index in indexes.tolist()]

    def close(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
