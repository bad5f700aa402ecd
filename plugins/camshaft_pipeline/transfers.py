"""Puts sends and receives between computations.

The rule: computations and messages of all ranks are put into one order, that of a clock on which every F, I and W takes
1 and a message nothing; the program of a rank is what concerns it, in that order. So a send follows the computation
that made its data at once, a receive stands where its data exists, and on every link (indeed between all ranks) sends
and receives come in the same order: the k-th receive from a rank takes the k-th send of that rank. A computation takes
time and a message needs its maker's end, so the order has no cycle: these programs end even where every send waits for
its receive, and also where all transfers of a rank, or of a pair of ranks, go through one queue.
"""

from __future__ import annotations

from collections.abc import Sequence

from camshaft.program import CLOSING, Action, Kind
from camshaft_pipeline.checker import check_work
from camshaft_pipeline.replay import B, F, I, replay
from camshaft_pipeline.schedule import Message, Program, Schedule, without_transfers

Event = tuple[float, int, tuple[int, ...] | Message, Action]


def complete(
    name: str, placement: tuple[int, ...], orders: Sequence[Sequence[Action]], peak: tuple[int, ...] | None = None
) -> Schedule:
    """The schedule whose rank r computes ``orders[r]``, in that order; closed by REDUCE, CLIP, STEP.

    Raises:
        ScheduleError: work is missing, done twice or on the wrong rank, or the ranks would wait for one another.
    """
    bare = Schedule(name, placement, tuple(without_transfers(order) for order in orders))
    check_work(bare, bare.microbatches)
    sending = [_with_sends(placement, program) for program in bare.programs]
    clock = replay(placement, sending)
    events: list[list[Event]] = [[] for _ in orders]
    for rank, program in enumerate(sending):
        for action, start in zip(program, clock.starts[rank], strict=True):
            if action.kind is Kind.SEND_F or action.kind is Kind.SEND_B:
                forward = action.kind is Kind.SEND_F
                carried = (action.microbatch, action.stage, forward)
                events[rank].append((start, 0, carried, action))
                taken = Action(Kind.RECV_F, action.microbatch, action.stage + 1)
                if not forward:
                    taken = Action(Kind.RECV_B, action.microbatch, action.stage - 1)
                events[placement[taken.stage]].append((start, 0, carried, taken))
            else:
                events[rank].append((start, 1, (), action))
    closing = tuple(Action(kind) for kind in CLOSING)
    programs = tuple((*(action for *_, action in sorted(found)), *closing) for found in events)
    return Schedule(name, placement, programs, peak)


def _with_sends(placement: tuple[int, ...], program: Program) -> Program:
    """Each computation, and behind it the send of what another rank needs of it."""
    last, found = len(placement) - 1, []
    for action in program:
        kind, microbatch, stage = action
        found.append(action)
        if kind is F and stage < last and placement[stage + 1] != placement[stage]:
            found.append(Action(Kind.SEND_F, microbatch, stage))
        elif (kind is B or kind is I) and stage > 0 and placement[stage - 1] != placement[stage]:
            found.append(Action(Kind.SEND_B, microbatch, stage))
    return tuple(found)
