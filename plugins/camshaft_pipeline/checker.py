"""Refuses schedules that are incomplete, out of order, out of memory, or that wait forever.

What is checked, on every schedule, also a third party's: (1) every stage is on one rank, and every rank does each
microbatch once in each of its stages, F before B, or before I and I before W; (2) every message between ranks is sent
once, after it was made, and received once, before it is needed, and nothing else is; (3) on each link (ordered pair of
ranks) the k-th receive takes the k-th send; (4) no deadlock, where a receive blocks until its message is there and
sends are buffered: a send never waits for its receive; (5) no more live activations than the schedule says.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from camshaft.program import CLOSING, COMPUTE, TRANSFERS, Action, Kind
from camshaft_pipeline.errors import ScheduleError
from camshaft_pipeline.replay import RECVS, SENDS, B, F, I, W, replay
from camshaft_pipeline.schedule import Program, Schedule, message

Places = dict[Action, int]
Link = tuple[int, int]


def check_schedule(schedule: Schedule, microbatches: int) -> None:
    """Check everything that this module names.

    Raises:
        ScheduleError: the first fault, with rank, action and reason.
    """
    for rank, program in enumerate(schedule.programs):
        _check_closing(rank, program)
    check_work(schedule, microbatches)
    for rank, program in enumerate(schedule.programs):
        _check_transfers(schedule, rank, program)
    _check_links(schedule)
    replay(schedule.placement, schedule.programs, blocking=True)
    _check_peak(schedule)


def check_work(schedule: Schedule, microbatches: int) -> None:
    """Check (1) alone: the computations of each rank, whatever stands between them.

    Raises:
        ScheduleError: the first fault, with rank, action and reason.
    """
    _check_placement(schedule)
    for rank, program in enumerate(schedule.programs):
        places = _places(schedule, rank, program, microbatches)
        for stage in schedule.stages_of(rank):
            for microbatch in range(microbatches):
                _check_pair(rank, places, microbatch, stage)


def _check_placement(schedule: Schedule) -> None:
    ranks = range(schedule.ranks)
    for stage, rank in enumerate(schedule.placement):
        if rank not in ranks:
            raise ScheduleError(f"stage {stage} is placed on rank {rank}, and there are {schedule.ranks} ranks")
    for rank in ranks:
        if rank not in schedule.placement:
            raise ScheduleError("holds no stage", rank=rank, fix="give each rank a stage, or use fewer ranks")


def _check_closing(rank: int, program: Program) -> None:
    closing = [action for action in program if action.kind in CLOSING]
    expected = [Action(kind) for kind in CLOSING]
    if closing != expected or list(program[-3:]) != expected:
        found = " ".join(map(str, closing)) or "none of them"
        raise ScheduleError(f"a program ends with REDUCE, CLIP, STEP, once each; found {found}", rank=rank)


_CLOSING, _COMPUTE, _TRANSFERS = frozenset(CLOSING), frozenset(COMPUTE), frozenset(TRANSFERS)


def _places(schedule: Schedule, rank: int, program: Program, microbatches: int) -> Places:
    """Where each action stands; refuses what is there twice, unknown, elsewhere or of no microbatch."""
    places: Places = {}
    for index, action in enumerate(program):
        kind, microbatch, stage = action
        if action in places:
            raise ScheduleError("is there twice", rank=rank, action=action)
        places[action] = index
        if kind in _CLOSING:
            continue
        if kind not in _COMPUTE and kind not in _TRANSFERS:
            raise ScheduleError("has no place in a pipeline's schedule", rank=rank, action=action)
        if not 0 <= stage < schedule.stages:
            raise ScheduleError(f"there are {schedule.stages} stages, from 0 on", rank=rank, action=action)
        if schedule.placement[stage] != rank:
            raise ScheduleError(f"stage {stage} is on rank {schedule.placement[stage]}", rank=rank, action=action)
        if not 0 <= microbatch < microbatches:
            raise ScheduleError(f"there are {microbatches} microbatches, from 0 on", rank=rank, action=action)
    return places


def _check_pair(rank: int, places: Places, microbatch: int, stage: int) -> None:
    """One microbatch in one stage: F, then B, or I and W."""
    forward, full = Action(F, microbatch, stage), Action(B, microbatch, stage)
    inputs, weights = Action(I, microbatch, stage), Action(W, microbatch, stage)
    if full in places:
        for half in (inputs, weights):
            if half in places:
                raise ScheduleError(f"is part of {full}, which is there too", rank=rank, action=half)
        needed = [forward, full]
    elif inputs in places or weights in places:
        needed = [forward, inputs, weights]
    else:
        raise ScheduleError(f"is missing, and so are {inputs} and {weights}", rank=rank, action=full)
    for action in needed:
        if action not in places:
            raise ScheduleError("is missing", rank=rank, action=action)
    for first, then in pairwise(needed):
        _check_order(rank, places, first, then)


def _check_order(rank: int, places: Places, first: Action, then: Action) -> None:
    if places[first] > places[then]:
        raise ScheduleError(f"comes before {first}, which it needs", rank=rank, action=then)


def _check_transfers(schedule: Schedule, rank: int, program: Program) -> None:
    places = {action: index for index, action in enumerate(program)}
    backwards = {action: B if action.kind is B else I for action in program if action.kind is B or action.kind is I}
    expected: set[Action] = set()
    for action in (*(action for action in program if action.kind is F), *backwards):
        for first, then in _surroundings(schedule, rank, action, places):
            for transfer in (first, then):
                if transfer.kind in _TRANSFERS:
                    expected.add(transfer)
                    if transfer not in places:
                        raise ScheduleError("is missing", rank=rank, action=transfer)
            _check_order(rank, places, first, then)
    for action in program:
        if action.kind in _TRANSFERS and action not in expected:
            raise ScheduleError(_why_needless(schedule, rank, action), rank=rank, action=action)


def _surroundings(schedule: Schedule, rank: int, action: Action, places: Places) -> Iterator[tuple[Action, Action]]:
    """Pairs (first, then) around a computation: where its data comes from, where its result goes to."""
    kind, microbatch, stage = action
    forward = kind is F
    ahead = 1 if forward else -1  # the way that data goes
    source, target = stage - ahead, stage + ahead
    if 0 <= source < schedule.stages:
        if schedule.placement[source] != rank:
            yield Action(Kind.RECV_F if forward else Kind.RECV_B, microbatch, stage), action
        else:
            local = Action(F if forward else B, microbatch, source)
            yield (local if local in places else Action(I, microbatch, source)), action
    if 0 <= target < schedule.stages and schedule.placement[target] != rank:
        yield action, Action(Kind.SEND_F if forward else Kind.SEND_B, microbatch, stage)


def _why_needless(schedule: Schedule, rank: int, action: Action) -> str:
    neighbour = action.stage + (1 if action.kind in (Kind.SEND_F, Kind.RECV_B) else -1)
    if 0 <= neighbour < schedule.stages:
        return f"stages {action.stage} and {neighbour} are both on rank {rank}: nothing is transferred"
    return f"there is no stage {neighbour}"


def _check_links(schedule: Schedule) -> None:
    """The k-th receive of each link takes the k-th send."""
    sends, receives = _by_link(schedule, SENDS), _by_link(schedule, RECVS)
    for link in sorted(sends.keys() | receives.keys()):
        sent, taken = sends.get(link, []), receives.get(link, [])
        for count, (send, receive) in enumerate(zip(sent, taken, strict=True)):
            if message(send) != message(receive):
                raise ScheduleError(
                    f"takes message {count} from rank {link[0]} to rank {link[1]}, and that is {send}",
                    rank=link[1],
                    action=receive,
                    fix=f"put the receives of rank {link[1]} into the order of rank {link[0]}'s sends",
                )


def _by_link(schedule: Schedule, kinds: tuple[Kind, ...]) -> dict[Link, list[Action]]:
    """(from, to) to the transfers of ``kinds``, in the order of the rank that makes them."""
    found: dict[Link, list[Action]] = {}
    for rank, program in enumerate(schedule.programs):
        for action in program:
            if action.kind in kinds:
                peer = schedule.peer(rank, action)
                found.setdefault((rank, peer) if action.kind in SENDS else (peer, rank), []).append(action)
    return found


def live_activations(program: Program) -> int:
    """The most activations that are live at once: F done, and B or W not yet."""
    live = peak = 0
    for action in program:
        if action.kind is F:
            live += 1
            peak = max(peak, live)
        elif action.kind is B or action.kind is W:
            live -= 1
    return peak


def _check_peak(schedule: Schedule) -> None:
    bounds = schedule.peak or ()
    if schedule.peak is not None and len(bounds) != schedule.ranks:
        raise ScheduleError(f"says how much {len(bounds)} ranks hold, and has {schedule.ranks}")
    for rank, bound in enumerate(bounds):
        found = live_activations(schedule.programs[rank])
        if found > bound:
            raise ScheduleError(f"holds {found} activations at once, and says {bound}", rank=rank)
