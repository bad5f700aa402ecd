"""``batch.on_out_of_memory: halve``: microbatches that do not fit are run again in two halves, on all ranks.

After each backward, before anybody is told of it, all ranks agree whether one of them ran out of memory: one sum of one
integer over the side channel. If so, all of them drop the gradients of the window, which a backward that broke off has
filled in part, and begin it again with every microbatch in two halves; these and later windows keep them. It is right
because a loss is a sum, divided by the weight of the whole window: in fp64 the numbers are those of a run that was not
disturbed. Not with dropout: a half draws numbers of its own.

Nothing may be exchanged during a forward or a backward then, or the other ranks would wait for one that gave up:
whoever sums gradients must provide the fact ``QUIET``, and the core must run the forwards and backwards itself.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from camshaft.errors import OutOfMemory, Problem, is_out_of_memory
from camshaft.host import Host
from camshaft.program import Action, Kind

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from camshaft.claims import Plan, PlanContext
    from camshaft.data.loader import Batch
    from camshaft.state import State
    from camshaft.strokes import Strokes

_log = logging.getLogger(__name__)

QUIET = "quiet_microbatches"
"""Fact of a plugin that claims an axis: nothing is sent between the first forward of a window and ``reduce``."""

SENDING = ("gradient.reduce", "parameter.layout", "activation.layout")
"""Resources whose owners along an axis exchange something, in forwards and backwards unless they say ``QUIET``."""

KEY = "batch.on_out_of_memory"


def problems(
    plans: Mapping[str, Plan], owners: Mapping[str, Sequence[str]], context: PlanContext | None = None
) -> Iterable[Problem]:
    """What keeps a microbatch from being run again in halves. ``context``: what plugins were asked with."""
    for name, plan in plans.items():
        sends = any(claim.axis and claim.resource in SENDING for claim in plan.claims)
        if sends and QUIET not in plan.provides and name not in owners.get("schedule", ()):
            yield Problem(
                f"{KEY}=halve and plugin '{name}' exclude each other: as it is set up, '{name}' exchanges tensors "
                "during forward or backward, where a rank that has to begin again would be waited for",
                key=KEY,
                fix=f"set {_overlap_of(name, context)}{KEY}=stop",
            )
    for name in owners.get("schedule", ()):
        yield Problem(
            f"{KEY}=halve and plugin '{name}' exclude each other: '{name}' owns the schedule, and runs forwards and "
            "backwards in its own order",
            key=KEY,
            fix=f"set {KEY}=stop, or remove plugins.{name}",
        )


def _overlap_of(name: str, context: PlanContext | None) -> str:
    """The option that most owners of a reduction have for it, where it helps: the plugin is asked again without it."""
    options = None if context is None else context.recipe.plugins.get(name)
    if options is None or getattr(options, "overlap", False) is not True:
        return ""
    host = Host.of({name: options.model_copy(update={"overlap": False})})
    quiet = any(QUIET in plan(context).provides for _, plan in host.implementations("plan"))
    return f"plugins.{name}.overlap=false, or " if quiet else ""


class Halver:
    """Runs the forwards and backwards of a window, as often as it takes. ``restart`` makes all of it undone."""

    def __init__(self, state: State, strokes: Strokes, restart: Callable[[], None]) -> None:
        self._state, self._strokes, self._restart = state, strokes, restart
        self._times = 0
        """How often microbatches are halved by now."""

    def run(self, beat: Callable[[int, str], None]) -> None:
        """Every microbatch of ``state.window``.

        Raises:
            OutOfMemory: a rank has no room for a single sample.
        """
        state = self._state
        assert state.window is not None
        self._strokes.agree()  # the side channel is free then
        pieces = state.window.batches
        for _ in range(self._times):
            pieces = _halved(pieces)
        while (lack := self._attempt(pieces, beat)) is not None:
            self._restart()
            gc.collect()
            self._free()
            smaller = _halved(pieces)
            if len(smaller) == len(pieces):
                raise OutOfMemory(f"out of memory with one sample at a time ({lack}). Shorten data.sequence_length")
            pieces, self._times = smaller, self._times + 1
            _log.warning(
                "out of memory at step %d (%s): microbatches are run in %d pieces each from here on%s",
                *(state.step, lack, 2**self._times),
                ", which draw random numbers of their own" if state.world.draws else "",
            )
        if self._times:
            state.extras["memory/halvings"] = self._times

    def _attempt(self, pieces: Sequence[Batch], beat: Callable[[int, str], None]) -> str | None:
        """Run all ``pieces`` as microbatches; what was missing, on any rank, or None."""
        state, strokes = self._state, self._strokes
        assert state.window is not None
        state.window.batches = [replace(piece) for piece in pieces]  # plugins may change what they are given
        for number in range(len(pieces)):
            loss, lack = self._stroke(number, number == len(pieces) - 1, beat)
            state.control.start((int(lack is not None),))
            if any(state.control.finish()):
                return lack or "on another rank"
            assert loss is not None
            strokes.count(loss)
            strokes.end_backward()
        return None

    def _stroke(self, number: int, last: bool, beat: Callable[[int, str], None]) -> tuple[Tensor | None, str | None]:
        """Forward and backward of a piece: (its loss, None), or (None, what was missing)."""
        import torch

        state, strokes = self._state, self._strokes
        try:
            beat(state.step, "forward")
            loss = strokes.forward(Action(Kind.F, number))
            strokes.begin_backward(Action(Kind.B, number))
            state.final_backward = state.last_backward = last
            beat(state.step, "backward")
            torch.autograd.backward(loss, strokes.scale(loss))
        except Exception as error:
            lack = _lack(error)
            if lack is None:
                raise
            return None, lack  # the traceback, and all that its frames hold, goes with the block
        return loss.detach(), None

    def _free(self) -> None:
        """Give the device back what nothing uses any more: halves need blocks of other sizes."""
        if self._state.world.device.type == "cuda":
            import torch

            torch.cuda.empty_cache()


def _lack(error: BaseException) -> str | None:
    """What an error says of missing memory; also where a plugin's error was made from it."""
    link: BaseException | None = error
    while link is not None:
        if is_out_of_memory(link):
            return (str(link).splitlines() or [type(link).__name__])[0]
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return None


def _halved(pieces: Sequence[Batch]) -> list[Batch]:
    """Each piece in two, rows in their order; those of one row stay."""
    found = []
    for piece in pieces:
        rows = piece.tokens.shape[0]
        middle = (rows + 1) // 2
        found += [piece] if rows == 1 else [_rows(piece, slice(middle)), _rows(piece, slice(middle, rows))]
    return found


def _rows(batch: Batch, rows: slice) -> Batch:
    labels = batch.labels[rows]
    document: torch.Tensor | None = None if batch.document is None else batch.document[rows]
    weight = int((labels >= 0).sum())
    return replace(
        batch,
        tokens=batch.tokens[rows],
        labels=labels,
        positions=batch.positions[rows],
        document=document,
        weight=weight,
    )
