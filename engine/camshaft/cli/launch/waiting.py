"""Which rank a collective waited for in vain, told from where every rank was when it timed out."""

from __future__ import annotations

import re
from pathlib import Path

from camshaft.cli.launch import heartbeat
from camshaft.cli.launch.exits import chain
from camshaft.cli.launch.heartbeat import Beat, doing

_TIMED_OUT = re.compile(r"timed out waiting (?:for )?(\d+) ?ms", re.IGNORECASE)
_MOST = 8

_ORDER = {
    name: place
    for place, name in enumerate(
        ("start", "connect", "build", "load", "log", "evaluate", "save", "data", "step", "forward", "backward",
         "reduce", "clip", "optimizer", "close", "end")
    )
}  # fmt: skip
"""Phases between two changes of the step count: that of ``log`` up to ``save`` is the step that was just done."""


def explain(error: BaseException, path: Path, rank: int) -> str:
    """What to say of a collective that timed out on ``rank``: how long it waited, and for whom, from the heartbeat
    file at ``path``. Empty if ``error`` is of another kind or no rank is behind.
    """
    told = next((found for one in chain(error) if (found := _TIMED_OUT.search(str(one)))), None)
    beats = heartbeat.read(path)
    own = next((beat for beat in beats if beat.rank == rank), None)
    if told is None or own is None:
        return ""
    late = [beat for beat in beats if _place(beat) < _place(own)]
    if not late:
        return ""
    names = [f"rank {beat.rank} has been at step {beat.step} during {doing(beat.phase)} since then" for beat in late]
    more = f", and {len(late) - _MOST} more" if len(late) > _MOST else ""
    return f"a collective waited {int(told.group(1)) / 1000:g} s in vain: {', '.join(names[:_MOST])}{more}"


def _place(beat: Beat) -> tuple[int, int]:
    return beat.step, _ORDER.get(beat.phase, 0)
