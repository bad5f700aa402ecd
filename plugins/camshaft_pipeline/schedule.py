"""A schedule: which rank holds which stage, and what each rank does in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from camshaft.program import CLOSING, TRANSFERS, Action, Kind

Program = tuple[Action, ...]
Message = tuple[int, int, bool]
"""(microbatch, stage that made it, forward): activations of that stage, or the gradient of its input."""


def loop_placement(ranks: int, virtual_stages: int) -> tuple[int, ...]:
    """Stage to rank, round and round: rank r holds stages r, r + ranks, ..."""
    return tuple(range(ranks)) * virtual_stages


def v_placement(ranks: int) -> tuple[int, ...]:
    """Stage to rank, there and back: rank r holds stages r and 2 ranks - 1 - r, so the last rank turns round alone."""
    return (*range(ranks), *reversed(range(ranks)))


@dataclass(frozen=True)
class Schedule:
    """One window of a pipeline as data; equal schedules are equal tables.

    ``placement[stage]`` is the rank of each (virtual) stage, ``programs[rank]`` what that rank does, in order.
    ``peak[rank]`` is the most activations that the rank may hold at once, each of one microbatch in one stage, from
    its F to its B (or W, which still needs it); None where nobody promised anything.
    """

    name: str
    placement: tuple[int, ...]
    programs: tuple[Program, ...]
    peak: tuple[int, ...] | None = None

    @property
    def ranks(self) -> int:
        """How many ranks the pipeline has."""
        return len(self.programs)

    @property
    def stages(self) -> int:
        """How many virtual stages the model is cut into."""
        return len(self.placement)

    @cached_property
    def microbatches(self) -> int:
        """How many microbatches the window has, by the highest number in the table."""
        return 1 + max((action.microbatch for program in self.programs for action in program), default=-1)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that ``rank`` holds, in the order of the model."""
        return tuple(stage for stage, owner in enumerate(self.placement) if owner == rank)

    def peer(self, rank: int, action: Action) -> int:
        """The other rank of a transfer that ``rank`` takes part in."""
        neighbour = action.stage + (1 if action.kind in (Kind.SEND_F, Kind.RECV_B) else -1)
        assert 0 <= neighbour < self.stages and self.placement[action.stage] == rank
        return self.placement[neighbour]


def without_transfers(program: Sequence[Action]) -> Program:
    """The program without transfers and without what closes the window."""
    return tuple(action for action in program if action.kind not in TRANSFERS and action.kind not in CLOSING)


def message(action: Action) -> Message:
    """What a transfer carries; both ends say the same."""
    if action.kind is Kind.SEND_F or action.kind is Kind.RECV_F:
        return action.microbatch, action.stage - (action.kind is Kind.RECV_F), True
    assert action.kind is Kind.SEND_B or action.kind is Kind.RECV_B
    return action.microbatch, action.stage + (action.kind is Kind.RECV_B), False
