"""Runs programs on a clock: when each action would start and end, and who would wait forever.

Every rank does its actions in order, one at a time. Sends are buffered: they cost the sender nothing, and each link (an
ordered pair of ranks) carries one message at a time. A computation starts when its rank is free and its data is there;
a receive either blocks at its place or only says that the data will be needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from camshaft.program import COMPUTE, TRANSFERS, Action
from camshaft_pipeline.errors import ScheduleError
from camshaft_pipeline.schedule import Message, Program, message

F, B, I, W = COMPUTE  # noqa: E741  the schedules' own letters
SEND_F, RECV_F, SEND_B, RECV_B = TRANSFERS
SENDS, RECVS = (SEND_F, SEND_B), (RECV_F, RECV_B)

Seconds = float | Sequence[float]


@dataclass(frozen=True)
class Times:
    """How long things take, in any one unit: one number for every stage, or one number for each. B takes I plus W.

    ``transfer`` is the time of one message from rank to rank; between stages of one rank it is 0.
    """

    forward: Seconds = 1
    inputs: Seconds = 1
    weights: Seconds = 1
    transfer: float = 0

    def table(self, stages: int) -> dict[object, tuple[float, ...]]:
        """Kind of computation to the time in each stage.

        Raises:
            ScheduleError: a list of times has not one for each stage, or a time is negative.
        """
        forward = _per_stage("forward", self.forward, stages)
        inputs = _per_stage("inputs", self.inputs, stages)
        weights = _per_stage("weights", self.weights, stages)
        _per_stage("transfer", self.transfer, 1)
        both = tuple(a + b for a, b in zip(inputs, weights, strict=True))
        return {F: forward, I: inputs, W: weights, B: both}


def _per_stage(name: str, value: Seconds, stages: int) -> tuple[float, ...]:
    times = tuple(value) if isinstance(value, Sequence) else (value,) * stages
    if len(times) != stages:
        raise ScheduleError(
            f"{len(times)} times of '{name}' for {stages} stages", fix="give one number, or one for each stage"
        )
    if not all(time >= 0 for time in times):
        raise ScheduleError(f"times of '{name}' must not be negative, got {min(times)}")
    return times


@dataclass
class Replay:
    """``starts[rank][index]``: when each action started; ``sent`` and ``arrived``: the times of each message."""

    starts: list[list[float]]
    ends: list[list[float]]
    sent: dict[Message, float] = field(default_factory=dict)
    arrived: dict[Message, float] = field(default_factory=dict)


def replay(
    placement: Sequence[int], programs: Sequence[Program], times: Times | None = None, *, blocking: bool = False
) -> Replay:
    """Run ``programs`` whose work was checked (``checker.check_work``) on a clock that starts at 0.

    Raises:
        ScheduleError: some ranks wait for one another, or for what nobody sends.
    """
    clock = _Clock(placement, programs, times or Times(), blocking)
    clock.run()
    return clock.result


class _Clock:
    def __init__(self, placement: Sequence[int], programs: Sequence[Program], times: Times, blocking: bool) -> None:
        self.placement, self.programs, self.blocking = placement, programs, blocking
        self.durations, self.transfer = times.table(len(placement)), times.transfer
        self.result = Replay([[] for _ in programs], [[] for _ in programs])
        self.now: list[float] = [0] * len(programs)
        self.links: dict[tuple[int, int], float] = {}
        self.available: dict[Message, float] = {}
        self.waiting: dict[Message, list[int]] = {}

    def run(self) -> None:
        ready = list(range(len(self.programs)))
        while ready:
            ready += self.advance(ready.pop())
        stuck = [rank for rank, ends in enumerate(self.result.ends) if len(ends) < len(self.programs[rank])]
        if stuck:
            self.refuse(stuck)

    def advance(self, rank: int) -> list[int]:
        """Go on with ``rank`` until it waits or ends; return the ranks that can go on now."""
        program, starts, ends = self.programs[rank], self.result.starts[rank], self.result.ends[rank]
        woken: list[int] = []
        for index in range(len(ends), len(program)):
            action = program[index]
            start, needed = self.now[rank], self.needs(action)
            if needed is not None:
                there = self.available.get(needed)
                if there is None:
                    self.waiting.setdefault(needed, []).append(rank)
                    break
                start = max(start, there)
            durations = self.durations.get(action.kind)
            end = start if durations is None else start + durations[action.stage]
            starts.append(start)
            ends.append(end)
            self.now[rank] = end
            made = self.hand_over(rank, action, end)
            if made is not None:
                woken += self.waiting.pop(made, ())
        return woken

    def needs(self, action: Action) -> Message | None:
        """The message without which ``action`` cannot start."""
        kind, microbatch, stage = action
        if kind is F:
            return (microbatch, stage - 1, True) if stage > 0 else None
        if kind is B or kind is I:
            return (microbatch, stage + 1, False) if stage + 1 < len(self.placement) else None
        return message(action) if self.blocking and kind in RECVS else None

    def hand_over(self, rank: int, action: Action, end: float) -> Message | None:
        """Note what became available through ``action``: to another rank by a send, on the same rank at once."""
        kind, microbatch, stage = action
        if kind in SENDS:
            made = microbatch, stage, kind is SEND_F
            peer = self.placement[stage + (1 if kind is SEND_F else -1)]
            begin = max(end, self.links.get((rank, peer), 0))
            self.result.sent[made] = begin
            self.result.arrived[made] = self.links[rank, peer] = self.available[made] = begin + self.transfer
            return made
        if kind is W or kind not in COMPUTE:
            return None
        made, neighbour = (microbatch, stage, kind is F), stage + (1 if kind is F else -1)
        if not 0 <= neighbour < len(self.placement) or self.placement[neighbour] != rank:
            return None
        self.available[made] = end
        return made

    def refuse(self, stuck: list[int]) -> None:
        """Follow who waits for whom from the first rank that waits, until a rank comes again or nothing follows."""
        first, rank = self.programs[stuck[0]][len(self.result.ends[stuck[0]])], stuck[0]
        seen: list[int] = []
        words = []
        while rank in stuck and rank not in seen:
            seen.append(rank)
            action = self.programs[rank][len(self.result.ends[rank])]
            needed = self.needs(action)
            assert needed is not None
            owner = self.placement[needed[1]]
            words.append(f"rank {rank} waits at {action} for {_say(needed)} from rank {owner}")
            rank = owner
        end = "and so on, round and round" if rank in seen else f"which rank {rank} never sends"
        raise ScheduleError(f"deadlock: {', '.join(_at_most(words, 6))}, {end}", rank=stuck[0], action=first)


def _at_most(words: Sequence[str], count: int) -> Iterable[str]:
    return words if len(words) <= count else [*words[: count - 1], f"... {len(words) - count + 1} more ..."]


def _say(needed: Message) -> str:
    microbatch, stage, forward = needed
    return f"the {'activations' if forward else 'gradient'} of microbatch {microbatch} out of stage {stage}"
