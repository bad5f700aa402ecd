"""The step as data: actions, the default program, and what a program must satisfy."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from camshaft.errors import PluginError

if TYPE_CHECKING:
    from camshaft.host import Host
    from camshaft.mesh import MeshShape


class Kind(Enum):
    """What one action does."""

    F = "forward"
    B = "backward"
    I = "backward of inputs"  # noqa: E741  the schedules' own letter
    W = "backward of weights"
    SEND = "send"
    RECV = "receive"
    UNSHARD = "unshard"
    RESHARD = "reshard"
    REDUCE = "reduce"
    CLIP = "clip"
    STEP = "step"


class Action(NamedTuple):
    """One thing that a rank does in a step. ``microbatch`` is -1 for actions of the whole window."""

    kind: Kind
    microbatch: int = -1

    def __str__(self) -> str:
        return self.kind.name if self.microbatch < 0 else f"{self.kind.name}{self.microbatch}"


def accumulate(microbatches: int) -> tuple[Action, ...]:
    """Gradient accumulation, the one-stage pipeline schedule: F0 B0 F1 B1 ... REDUCE CLIP STEP."""
    body = [Action(kind, index) for index in range(microbatches) for kind in (Kind.F, Kind.B)]
    return (*body, Action(Kind.REDUCE), Action(Kind.CLIP), Action(Kind.STEP))


def check(program: Iterable[Action], microbatches: int, owner: str) -> tuple[Action, ...]:
    """Refuse a program that skips or repeats work, or that ends otherwise than REDUCE, CLIP, STEP.

    Raises:
        PluginError: naming ``owner`` and the first fault.
    """
    actions = tuple(program)
    closing = tuple(action.kind for action in actions if action.microbatch < 0 and action.kind in _CLOSING)
    if closing != _CLOSING or tuple(action.kind for action in actions[-3:]) != _CLOSING:
        raise PluginError(owner, "schedule", "a program ends with REDUCE, CLIP, STEP, once each")
    for kind in (Kind.F, Kind.B):
        found = sorted(action.microbatch for action in actions if action.kind is kind)
        if found != list(range(microbatches)):
            raise PluginError(
                owner,
                "schedule",
                f"{kind.name} must run once for each of {microbatches} microbatches, got {found}",
            )
    for index in range(microbatches):
        if actions.index(Action(Kind.F, index)) > actions.index(Action(Kind.B, index)):
            raise PluginError(owner, "schedule", f"B{index} comes before F{index}")
    return actions


def window_program(host: Host, mesh: MeshShape, rank: int, microbatches: int) -> tuple[Action, ...]:
    """The checked program of one window for ``rank``: the schedule owner's, or plain accumulation."""
    owner = host.owner("schedule")
    actions = accumulate(microbatches) if owner is None else owner[1](mesh, rank, microbatches)
    return check(actions, microbatches, "core" if owner is None else owner[0])


_CLOSING = (Kind.REDUCE, Kind.CLIP, Kind.STEP)


def brief(program: tuple[Action, ...]) -> str:
    """The program on one line, with a long middle left out."""
    words = [str(action) for action in program]
    if len(words) > 24:
        words = [*words[:10], f"... {len(words) - 20} more ...", *words[-10:]]
    return " ".join(words)
