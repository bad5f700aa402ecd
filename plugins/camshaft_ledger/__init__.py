"""Counts every byte that ranks exchange, and names a rank that calls another collective than its peers.

Counted are the calls of plugins and of the core, which go through ``camshaft.comm``, and what libraries start inside
(DTensor, ``fully_shard``, DDP, DeepSpeed), at torch's process groups. Bytes are those that this rank sends by theory,
for rings and pairwise exchanges: see ``camshaft.comm.sent``. Means a step go into every record as
``plugin/ledger/<plugin>/<axis>/<op>/bytes_per_step`` and ``.../calls_per_step``, their sums as
``plugin/ledger/bytes_per_step`` and ``.../calls_per_step``; at the end rank 0 writes ``ledger.json`` into the run
directory, and shows it as a table.

Compared are (plugin, hook, axis, op, dtype, elements) of each call. On one node a rank sees at once when a peer has
called something else, before it sends; a rolling hash per axis is compared after every step; and a rank that has not
called anything for a while asks all others over their store what they called last. A rank that is only slow has called
less, and nothing else. Where ranks differ the run ends with status 3, and its error says which rank, plugin, hook and
call.

Memory: half a KiB of host memory a rank and axis; the calls of the last steps. Traffic: 8 bytes an axis and rank, and
step that is compared. Claims nothing.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

import camshaft

if TYPE_CHECKING:
    from camshaft.state import State
    from camshaft_ledger.ledger import Ledger

_logger = logging.getLogger("camshaft.ledger")
_TOTAL = "plugin/ledger/bytes_per_step"


class Options(camshaft.Options):
    """What is counted, and how closely ranks watch one another."""

    table: bool = True
    """Show the sums when the run ends; ``ledger.json`` is written in any case."""
    library: bool = True
    """Also count what libraries start inside, at 10 to 50 us a call."""
    compare_every: Annotated[int, Field(ge=1)] = 1
    """Steps between two comparisons of the rolling hashes."""
    stall_s: Annotated[float, Field(ge=0.5)] = 2.0
    """Seconds without a call after which a rank asks what the others called."""


class Plugin(camshaft.Plugin):
    """The ledger of communication. With one process there is none, and it writes zeros."""

    Options = Options
    draws = False
    _ledger: Ledger | None = None

    @camshaft.hookimpl
    def plan(self) -> camshaft.Plan:
        """Owns nothing."""
        return camshaft.Plan()

    @camshaft.hookimpl
    def bind(self, state: State) -> None:
        """Meet the other ranks, and listen from here on."""
        if state.world.world_size == 1:
            return
        from camshaft_ledger.ledger import Ledger

        options = self.options
        self._ledger = Ledger(
            state.world,
            self.name,
            compare_every=options.compare_every,
            stall_s=options.stall_s,
            library=options.library,
        )
        self._ledger.open()

    @camshaft.hookimpl
    def pre_run(self, state: State) -> None:
        """What was sent up to here belongs to no step."""
        if self._ledger is not None:
            self._ledger.begin(state.step)

    @camshaft.hookimpl
    def around_step(self, state: State, call: Callable[[], None]) -> Callable[[], None]:
        """Offer the means to the record that may come now; what is sent later in a step belongs to the next one."""

        def step() -> None:
            call()
            if self._ledger is None:
                state.extras[_TOTAL] = 0.0
                return
            self._ledger.book.steps += 1
            state.extras.update(self._ledger.book.metrics())

        return step

    @camshaft.hookimpl
    def log(self, record: Mapping[str, float | int]) -> None:
        """The means have been written: the next ones begin here."""
        if self._ledger is not None and _TOTAL in record:
            self._ledger.book.mark()

    @camshaft.hookimpl
    def post_step(self, state: State) -> None:
        """Compare what ranks have called."""
        if self._ledger is not None:
            self._ledger.end_step(state.step)

    @camshaft.hookimpl
    def close(self, state: State, status: str) -> None:
        """Write the sums; make sure that no rank waits for calls that will not come."""
        ledger, self._ledger = self._ledger, None
        if ledger is None:
            return
        ledger.close(status, sys.exc_info()[1])
        if not state.world.is_main:
            return
        from camshaft_ledger.book import table

        summary = {"rank": 0, "world_size": state.world.world_size, **ledger.book.summary()}
        path = state.world.run.path / "ledger.json"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(summary, indent=2) + "\n")
        except OSError as error:
            _logger.warning("%s cannot be written: %s", path, error)
        if self.options.table:
            _logger.info("bytes that rank 0 sent, by theory\n%s", table(summary))
