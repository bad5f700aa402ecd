"""What a rank sends along ``pp`` in a step, and how long it is idle, from the schedule alone. No torch.

A stage sends T h values of the parameters' width for each microbatch to a stage of another rank (T tokens; divided by
``tp`` where that divides them), and as many for the gradient of its input. A tied parameter travels once there, in the
parameters' width, and its gradient once back, in that of kept gradients.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from camshaft.estimate import Estimate, Sent
from camshaft.program import Kind
from camshaft_pipeline.options import Options
from camshaft_pipeline.planning import schedule_of
from camshaft_pipeline.shapes import schedule_for
from camshaft_pipeline.simulator import simulate

if TYPE_CHECKING:
    from camshaft.activations import Kept
    from camshaft.claims import PlanContext
    from camshaft.estimate import Sizes
    from camshaft_pipeline.schedule import Schedule


def estimate(options: Options, context: PlanContext, sizes: Sizes) -> Estimate:
    """Traffic of this rank, and the bubble of all."""
    schedule = schedule_for(options, context)
    place = context.mesh.coordinates(sizes.rank)["pp"]
    bubble, peak = _simulated(options.model_dump_json(), schedule.ranks, schedule.microbatches)
    notes = (_note(schedule, bubble, peak[place]),)
    if sizes.config is None:
        return Estimate(notes=(*notes, "what is sent along pp is not counted: a plugin builds a model of its own"))
    messages = sum(action.kind in (Kind.SEND_F, Kind.SEND_B) for action in schedule.programs[place])
    count = messages * sizes.hidden * sizes.widths.param + _ties(sizes)
    return Estimate(sent=(Sent("pp", "send", count),) if count else (), notes=notes)


@lru_cache(maxsize=8)
def _simulated(options: str, ranks: int, microbatches: int) -> tuple[float, tuple[int, ...]]:
    """Bubble, and what each rank holds. ``options`` as JSON, so that ranks can share the answer."""
    timeline = simulate(schedule_of(Options.model_validate_json(options), ranks, microbatches))
    return timeline.bubble, timeline.peak


def _note(schedule: Schedule, bubble: float, peak: int) -> str:
    return (
        f"schedule {schedule.name}: {schedule.stages} stages on {schedule.ranks} ranks, {schedule.microbatches} "
        f"microbatches; bubble {bubble:.1%} of the time that a rank works (forward, backward of inputs and backward of "
        f"weights 1 each, messages 0); activations of {peak} microbatches in a stage are held at once"
    )


def _ties(sizes: Sizes) -> int:
    """Bytes of tied parameters that go to another rank, and of gradients that come back to their owner."""
    back = sum(each.elements for each in sizes.borrowed if each.trains) * sizes.widths.gradient
    own = {each.name: each for each in sizes.parameters or ()}
    lent = [own[each.name] for each in sizes.whole or () if each.tied and each.name in own]
    there = sum(each.elements for each in lent if not each.tied) * sizes.widths.param
    return there + back


def in_flight(options: Options, context: PlanContext, sizes: Sizes, kept: tuple[Kept, ...]) -> tuple[Kept, ...]:
    """``kept`` with the number of microbatches that each stage holds when this rank's program holds most bytes.

    A microbatch is held by a stage from its F to its B, or W where the backward is split.
    """
    schedule = schedule_for(options, context)
    program = schedule.programs[context.mesh.coordinates(sizes.rank)["pp"]]
    sums: Counter[int] = Counter()
    for each in kept:
        sums[each.stage] += each.bytes
    live: Counter[int] = Counter()
    fullest: Counter[int] = Counter()
    most = -1
    for action in program:
        if action.kind in (Kind.B, Kind.W):
            live[action.stage] -= 1
        elif action.kind is Kind.F:
            live[action.stage] += 1
            held = sum(count * sums[stage] for stage, count in live.items())
            if held > most:
                most, fullest = held, live.copy()
    return tuple(replace(each, microbatches=fullest[each.stage]) for each in kept)
