"""Counts what runs compile, and says what should not have been."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from camshaft.errors import CamshaftError
from camshaft_compile.counting import Counting, Events

if TYPE_CHECKING:
    from torch import Tensor

    from camshaft.data.loader import Batch
    from camshaft.hookspecs import Forward
    from camshaft.state import State
    from camshaft_compile.blocks import Blocks

_log = logging.getLogger(__name__)


class Watcher:
    """Tells graphs of the warm-up from those that come later: training and evaluation warm up on their own, and so does
    training anew where microbatches that did not fit are halved from here on.
    """

    def __init__(self, state: State, name: str, blocks: Blocks, *, strict: bool) -> None:
        self._state, self._name, self._blocks, self._strict = state, name, blocks, strict
        self._counting = Counting()
        self._warm: set[tuple[str, int]] = set()
        """Training or evaluation, and microbatches of a window."""
        self._told: set[str] = set()

    def around(self, call: Forward) -> Forward:
        """Look after each forward of an evaluation; those of training are counted window by window.

        CUDA graphs are told where a forward begins: each block's call would count as the first of a new one else, and
        the graphs might write where the block before has put what this one reads. Backward waiting for it forbids that
        in training alone.
        """

        def forward(batch: Batch) -> Tensor:
            if self._blocks.graphs:
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            made = call(batch)
            if not torch.is_grad_enabled():
                self._look("evaluation", 0)
            return made

        return forward

    def end_window(self) -> None:
        """Count what the window compiled."""
        assert self._state.window is not None
        self._look("training", len(self._state.window.batches))

    def _look(self, part: str, microbatches: int) -> None:
        events, extras, way = self._counting.take(), self._state.extras, (part, microbatches)
        for key, found in (("graph_breaks", events.breaks), ("recompiles", events.recompiles)):
            name = f"plugin/{self._name}/{key}"
            extras[name] = extras.get(name, 0) + (len(found) if way in self._warm or key == "graph_breaks" else 0)
        if not self._blocks.compiled:
            return
        if way in self._warm:
            self._complain(part, events)
        elif part == "training" or events:
            self._warm.add(way)
            self._tell(part, events)

    def _tell(self, part: str, events: Events) -> None:
        if self._state.world.is_main:
            _log.info(
                "%s: compiled %d graph(s) for %d module(s) in %.1f s, with %d graph break(s)%s",
                part,
                events.graphs,
                len(self._blocks.names),
                events.seconds,
                len(events.breaks),
                "".join(f"\n  {reason}" for reason in dict.fromkeys(events.breaks)),
            )

    def _complain(self, part: str, events: Events) -> None:
        """Say each reason once.

        Raises:
            CamshaftError: with ``strict``.
        """
        for kind, reasons in (("recompiled", events.recompiles), ("broke a graph", events.breaks)):
            for reason in dict.fromkeys(reasons):
                text = (
                    f"{part} {kind} after warm-up, at step {self._state.step + 1}: {reason}. Each time costs seconds; "
                    f"see plugins.{self._name}.modules and .dynamic"
                )
                if self._strict:
                    raise CamshaftError(f"{text}. plugins.{self._name}.strict makes this an error")
                if reason not in self._told:
                    self._told.add(reason)
                    _log.warning("%s", text)
