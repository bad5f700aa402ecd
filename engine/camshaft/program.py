"""The step as data: actions, the default program, and what a program must satisfy."""

from __future__ import annotations

import re
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
    SEND_F = "send activations"
    RECV_F = "receive activations"
    SEND_B = "send gradients"
    RECV_B = "receive gradients"
    UNSHARD = "unshard"
    RESHARD = "reshard"
    REDUCE = "reduce"
    CLIP = "clip"
    STEP = "step"

    __hash__ = object.__hash__  # an Enum's own is made in Python, each time an action is looked up


class Action(NamedTuple):
    """One thing that a rank does in a step: ``kind`` of ``microbatch`` in ``stage``.

    ``microbatch`` is -1 for actions of the whole window. ``stage`` is one of the rank's own (virtual) stages, numbered
    over the whole pipeline: SEND_F sends what that stage's forward made to the next stage, RECV_F receives its input
    from the stage before; SEND_B sends the gradient of its input to the stage before, RECV_B receives the gradient of
    its output from the next one. Who the peer is follows from where the stages are.
    """

    kind: Kind
    microbatch: int = -1
    stage: int = 0

    def __str__(self) -> str:
        """``F3@2`` for microbatch 3 in stage 2; stage 0 is left out, and the microbatch where there is none."""
        name = self.kind.name if self.microbatch < 0 else f"{self.kind.name}{self.microbatch}"
        return name if self.stage == 0 else f"{name}@{self.stage}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """The action that ``str`` writes as ``text``.

        Raises:
            ValueError: naming the text and what an action looks like.
        """
        found = _WRITTEN.fullmatch(text)
        kind = Kind.__members__.get(found["kind"]) if found else None
        if found and kind:
            action = cls(kind, int(found["microbatch"] or -1), int(found["stage"] or 0))
            if kind in CLOSING:
                right = action == cls(kind)
            else:
                right = action.microbatch >= 0 or kind not in (*COMPUTE, *TRANSFERS)
            if right:
                return action
        raise ValueError(f"'{text}' is no action; write F3 or F3@2 (microbatch 3, stage 2), or REDUCE, CLIP, STEP")


COMPUTE = (Kind.F, Kind.B, Kind.I, Kind.W)
TRANSFERS = (Kind.SEND_F, Kind.RECV_F, Kind.SEND_B, Kind.RECV_B)
CLOSING = (Kind.REDUCE, Kind.CLIP, Kind.STEP)
_WRITTEN = re.compile(r"(?P<kind>[A-Z]+(_[A-Z]+)?)(?P<microbatch>\d+)?(@(?P<stage>\d+))?", re.ASCII)


def accumulate(microbatches: int) -> tuple[Action, ...]:
    """Gradient accumulation, the one-stage pipeline schedule: F0 B0 F1 B1 ... REDUCE CLIP STEP."""
    body = [Action(kind, index) for index in range(microbatches) for kind in (Kind.F, Kind.B)]
    return (*body, Action(Kind.REDUCE), Action(Kind.CLIP), Action(Kind.STEP))


def check(program: Iterable[Action], microbatches: int, owner: str) -> tuple[Action, ...]:
    """Refuse a program that skips or repeats work, or that ends otherwise than REDUCE, CLIP, STEP.

    In every stage that the program names, each microbatch has one F and then either one B, or one I and then one W.

    Raises:
        PluginError: naming ``owner`` and the first fault.
    """
    actions = tuple(program)
    closing = tuple(action.kind for action in actions if action.microbatch < 0 and action.kind in CLOSING)
    if closing != CLOSING or tuple(action.kind for action in actions[-3:]) != CLOSING:
        raise PluginError(owner, "schedule", "a program ends with REDUCE, CLIP, STEP, once each")
    compute = [action for action in actions if action.kind in COMPUTE]
    fault = _work_fault(compute, microbatches) or _order_fault(compute)
    if fault:
        raise PluginError(owner, "schedule", fault)
    return actions


def _work_fault(compute: list[Action], microbatches: int) -> str:
    """What is done twice, or not at all; empty if everything is done once."""
    done: dict[tuple[int, Kind], list[int]] = {}
    for kind, microbatch, stage in compute:
        done.setdefault((stage, kind), []).append(microbatch)
    for stage in sorted({stage for stage, _ in done}) or [0]:
        forward, full, inputs, weights = (sorted(done.get((stage, kind), ())) for kind in COMPUTE)
        place = f" in stage {stage}" if stage else ""
        expected = list(range(microbatches))
        if inputs != weights:
            return f"I and W must run for the same microbatches{place}, got {inputs} and {weights}"
        for name, found in (("F", forward), ("B", sorted(full + inputs))):
            if found != expected:
                return f"{name} must run once for each of {microbatches} microbatches{place}, got {found}"
    return ""


def _order_fault(compute: list[Action]) -> str:
    """The first action that comes before what it needs of the same stage; every action is there once."""
    place = {action: index for index, action in enumerate(compute)}
    for action, index in place.items():
        first = _NEEDS.get(action.kind)
        if first is not None and place[action._replace(kind=first)] > index:
            return f"{action} comes before {action._replace(kind=first)}"
    return ""


_NEEDS = {Kind.B: Kind.F, Kind.I: Kind.F, Kind.W: Kind.I}


def window_program(host: Host, mesh: MeshShape, rank: int, microbatches: int) -> tuple[Action, ...]:
    """The checked program of one window for ``rank``: the schedule owner's, or plain accumulation."""
    owner = host.owner("schedule")
    actions = accumulate(microbatches) if owner is None else owner[1](mesh, rank, microbatches)
    return check(actions, microbatches, "core" if owner is None else owner[0])


def brief(program: tuple[Action, ...]) -> str:
    """The program on one line, with a long middle left out."""
    words = [str(action) for action in program]
    if len(words) > 24:
        words = [*words[:10], f"... {len(words) - 20} more ...", *words[-10:]]
    return " ".join(words)
