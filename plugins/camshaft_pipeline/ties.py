"""Tied parameters: the stage that owns one sends it to the stage that borrows it, and gets the gradient back.

The owner sends at its first forward of a window (in evaluation: of each pass), where whoever stores the parameter has
it ready; the borrower's copy is a leaf of its graphs and adds up the window's gradient, which joins the owner's own
when that enters the parameter in the stage's last backward of the window. So there is one gradient, one update and one
optimizer state, and copies are equal because they are copies. Memory on the borrower: the copy and its gradient.
Traffic: one parameter there and one back in a window. Both travel in a group of the two ranks alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, Parameter

from camshaft.comm import Channel, Pending
from camshaft_pipeline.cutting import Tie
from camshaft_pipeline.transport import HOOK, Form, Line

if TYPE_CHECKING:
    from camshaft.state import State


class Ties:
    """All ties that this rank has a part in. Making it is collective: all ranks make it, in one order."""

    def __init__(
        self, state: State, ties: Sequence[Tie], placement: Sequence[int], backwards: Mapping[int, int]
    ) -> None:
        """``backwards``: stage to how many B and I it has in a window."""
        here = state.world.mesh.shape.coordinates(state.world.rank)["pp"]
        self._owners: list[Owner] = []
        self._borrowers: list[Borrower] = []
        for tie in ties:
            own, use = placement[tie.owner], placement[tie.user]
            line = None if own == use else _line(state, here, own, use)
            owner = Owner(state, tie, line) if here == own else None
            if owner is not None:
                self._owners.append(owner)
            if here == use:
                self._borrowers.append(Borrower(state, tie, line, owner, backwards.get(tie.user, 0)))

    def modules(self) -> list[Module]:
        """Modules whose weight is borrowed: their gradient must be complete after the last I."""
        return [borrower.module for borrower in self._borrowers]

    def copies(self, stage: int) -> list[Tensor]:
        """Copies that train in ``stage``: their gradients are added up in I, not W."""
        found = [borrower.copy for borrower in self._borrowers if borrower.stage == stage]
        return [copy for copy in found if copy.requires_grad]

    def start_window(self) -> None:
        """The next forward of each owner sends; borrowers get ready."""
        for owner in self._owners:
            owner.start()
        for borrower in self._borrowers:
            borrower.start()

    def before_forward(self, stage: int) -> None:
        """A borrower waits for its copy."""
        for borrower in self._borrowers:
            if borrower.stage == stage:
                borrower.take()

    def before_backward(self, stage: int) -> None:
        """An owner posts the receive of the gradient at its first backward of the window."""
        for owner in self._owners:
            if owner.stage == stage:
                owner.expect()

    def after_backward(self, stage: int) -> None:
        """After B and I, never after W: a borrower counts, and hands its gradient over after its last."""
        for borrower in self._borrowers:
            if borrower.stage == stage:
                borrower.count()

    def end_window(self) -> None:
        """Wait until everything is sent."""
        for owner in self._owners:
            owner.settle()
        for borrower in self._borrowers:
            borrower.settle()

    def close(self) -> None:
        """Remove what was put on modules and tensors."""
        for owner in self._owners:
            owner.close()


def _line(state: State, here: int, *places: int) -> Line | None:
    """A line between two places of the pipeline; only those two make it."""
    if here not in places:
        return None
    mesh, timeout = state.world.mesh, state.world.recipe.launch.group_timeout_s
    ranks = dist.get_process_group_ranks(mesh.group("pp"))
    wait = timedelta(seconds=timeout)
    pair = sorted(ranks[place] for place in places)
    group = dist.new_group(pair, timeout=wait, use_local_synchronization=True)
    return Line(Channel(group, "pipeline", "pp", wait), state.world.device, kept=2)


class Owner:
    """The parameter's side."""

    def __init__(self, state: State, tie: Tie, line: Line | None) -> None:
        self.stage, self._state, self._line = tie.owner, state, line
        module_name, _, self._leaf = tie.name.rpartition(".")
        self._module = state.model.get_submodule(module_name)
        self._due = False
        self._told = False
        self._back: tuple[Pending, Tensor] | None = None
        self.gradient: Tensor | None = None
        """From a borrower on this rank."""
        self.copy: Tensor | None = None
        self._forward = self._module.forward
        self._own = "forward" in vars(self._module)
        self._module.forward = self._share_then_run
        self._hook = None
        if self.parameter.requires_grad:
            self._hook = self.parameter.register_hook(self._join)  # type: ignore[no-untyped-call]

    @property
    def parameter(self) -> Parameter:
        parameter = getattr(self._module, self._leaf)
        assert isinstance(parameter, Parameter)
        return parameter

    @property
    def _peer(self) -> int:
        assert self._line is not None
        return 1 - self._line.channel.rank

    def start(self) -> None:
        self._due, self.gradient, self._back = True, None, None

    def _share_then_run(self, *arguments: Any, **named: Any) -> Any:
        if self._due:  # here the parameter is whole, whoever stores it
            self._due = False
            self._share()
        return self._forward(*arguments, **named)

    def _share(self) -> None:
        parameter = self.parameter
        # A storage that is given back after this forward is not there any more when the copy is read.
        values = parameter.detach() if self._state.world.readable else parameter.detach().clone()
        if self._line is None:
            self.copy = values
            return
        if not self._told:
            self._told = True
            self._line.tell(Form.of(parameter), self._peer)
        self._line.send(values.contiguous(), self._peer)

    def expect(self) -> None:
        if self._line is None or self._back is not None or not self.parameter.requires_grad:
            return
        parameter = self.parameter
        kept = parameter.grad_dtype or parameter.dtype
        room = torch.empty(tuple(parameter.shape), dtype=kept, device=self._line.device)
        self._back = self._line.channel.recv(room, self._peer, HOOK), room

    def _join(self, gradient: Tensor) -> Tensor | None:
        """Add the borrower's gradient in the stage's last backward of the window."""
        if not (self._state.final_backward and self._state.stage == self.stage):
            return None
        other, self.gradient = self.gradient, None
        if self._back is not None:
            pending, other = self._back
            pending.wait()
        return None if other is None else gradient + other

    def settle(self) -> None:
        self.copy = None
        if self._line is not None:
            self._line.settle()

    def close(self) -> None:
        if self._own:
            self._module.forward = self._forward
        else:
            vars(self._module).pop("forward", None)
        if self._hook is not None:
            self._hook.remove()


class Borrower:
    """The copy's side."""

    def __init__(self, state: State, tie: Tie, line: Line | None, owner: Owner | None, backwards: int) -> None:
        self.stage, self._state, self._line, self._owner = tie.user, state, line, owner
        self.module, self._leaf = state.model.get_submodule(tie.module), tie.leaf
        self._form: Form | None = None
        self._backwards, self._left = backwards, 0
        self._coming: Pending | None = None
        self._fresh = False

    @property
    def copy(self) -> Tensor:
        found: Tensor = getattr(self.module, self._leaf)
        return found

    def start(self) -> None:
        self._left, self._fresh = self._backwards, True
        if self._line is not None and self._form is not None:
            self._post()

    def _post(self) -> None:
        assert self._line is not None
        self._coming = self._line.channel.recv(self.copy.detach(), 1 - self._line.channel.rank, HOOK)

    def take(self) -> None:
        """Have this window's values, before the first forward."""
        if not self._fresh:
            return
        self._fresh = False
        if self._line is None:
            assert self._owner is not None and self._owner.copy is not None
            self._adopt(self._owner.copy, self._owner.parameter.requires_grad)
            return
        if self._form is None:
            self._form = self._line.ask(1 - self._line.channel.rank)
            self._adopt(self._form.empty(self._line.device), self._form.trains)
            self._post()
        assert self._coming is not None
        self._coming.wait()

    def _adopt(self, values: Tensor, trains: bool) -> None:
        copy = values.requires_grad_(trains)
        if trains and self._state.world.policy.kept != copy.dtype:
            copy.grad_dtype = self._state.world.policy.kept
        setattr(self.module, self._leaf, copy)

    def count(self) -> None:
        self._left -= 1
        if self._left or not self.copy.requires_grad:
            return
        copy = self.copy
        gradient = copy.grad
        copy.grad = None
        if gradient is None:
            gradient = torch.zeros_like(copy, dtype=copy.grad_dtype or copy.dtype)
        if self._owner is not None:
            self._owner.gradient = gradient
        else:
            assert self._line is not None
            self._line.send(gradient, 1 - self._line.channel.rank)

    def settle(self) -> None:
        if self._line is not None:
            self._line.settle()
