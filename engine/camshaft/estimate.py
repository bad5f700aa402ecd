"""Bytes of a run that is not built: model state on a rank, and what a rank sends in a step. Pure, made without torch.

The terms are those of Rajbhandari et al. (arXiv:1910.02054), section 5: P elements in mixed precision with Adam take
2 P bytes of parameters, 2 P of gradients and 12 P of masters and moments, each whole or divided over N ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from camshaft.claims import Widths
from camshaft.errors import PluginError

if TYPE_CHECKING:
    from camshaft.models.config import ModelConfig
    from camshaft.models.shapes import ParameterShape


@dataclass(frozen=True, slots=True)
class Sizes:
    """What bytes are counted from: of one rank, after all axes that divide the model itself."""

    elements: int
    """Elements of the rank's parameters, tied ones once."""
    trained: int
    """Those that the optimizer updates."""
    accumulation: int
    """Microbatches of a step on one rank."""
    widths: Widths
    moments: float | None
    """Values of the master dtype that the optimizer keeps for each element; None: it does not say."""
    parameters: tuple[ParameterShape, ...] | None
    """Each parameter in the model's order; None where a plugin builds a model of its own."""
    rank: int = 0
    borrowed: tuple[ParameterShape, ...] = ()
    """Copies of parameters that ranks of another stage own and update; in no number above."""
    whole: tuple[ParameterShape, ...] | None = None
    """Each parameter of the whole model."""
    config: ModelConfig | None = None
    """The architecture. None where a plugin builds a model of its own."""
    hidden: int = 0
    """Elements of the hidden states of one microbatch between two layers, on this rank; 0 where ``config`` is None."""


@dataclass(frozen=True, slots=True)
class StateBytes:
    """Model state of the rank that holds most, by kind."""

    parameters: int
    gradients: int
    """Summed gradients, from the reduction to the end of the step."""
    masters: int
    """Weights that the optimizer updates, where they are not the parameters themselves."""
    moments: int | None
    """What the optimizer keeps besides; None: unknown."""

    @property
    def total(self) -> int:
        """Sum of all kinds that are known."""
        return self.parameters + self.gradients + self.masters + (self.moments or 0)


class Sent(NamedTuple):
    """What one rank sends in a step along ``axis`` by operation ``op`` (the name of ``camshaft.comm.Channel``'s)."""

    axis: str
    op: str
    bytes: int


CLOSING = "during the step"
"""Last words of the name of a buffer that is there from the reduction to the end of the step only, when forwards keep
nothing any more."""

PASSING = "on their way"
"""Last words of the name of a buffer that is there from a window's first gradient until all are summed only."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A plugin's answer. Only the owner of storage tells ``state``; buffers and traffic of all plugins add up."""

    state: StateBytes | None = None
    buffers: tuple[tuple[str, int], ...] = ()
    """(what it is, bytes) of memory beside the model state; what ends in ``CLOSING`` is beside no activation, and
    what ends in ``PASSING`` grows as gradients come."""
    sent: tuple[Sent, ...] = ()
    notes: tuple[str, ...] = ()
    """Sentences that ``camshaft plan`` prints below: the price of an option, what is not counted."""


def state_bytes(
    elements: int,
    widths: Widths,
    moments: float | None,
    *,
    trained: int | None = None,
    parameters: int = 1,
    gradients: int = 1,
    optimizer: int = 1,
) -> StateBytes:
    """Model state of one rank when each kind is divided evenly over so many ranks (1: each has all of it).

    Args:
        elements: of all parameters.
        widths: bytes of one element of each kind.
        moments: values that the optimizer keeps for each element; None if unknown.
        trained: elements with gradients and optimizer state; all by default.
        parameters, gradients, optimizer: ranks that share one copy; ``optimizer`` divides masters too.
    """
    trained = elements if trained is None else trained
    updated = _share(trained, optimizer)
    return StateBytes(
        parameters=_share(elements, parameters) * widths.param,
        gradients=_share(trained, gradients) * widths.gradient,
        masters=updated * widths.master_copy,
        moments=None if moments is None else round(updated * moments * widths.master),
    )


def _share(elements: int, ranks: int) -> int:
    return -(-elements // ranks)


def replicated(sizes: Sizes) -> Estimate:
    """Every rank has all of it, and the core keeps masters: what is so without an owner of storage."""
    widths = sizes.widths
    state = state_bytes(sizes.elements, widths, sizes.moments, trained=sizes.trained)
    if not widths.master_copy or widths.gradient == widths.master:
        return Estimate(state)
    return Estimate(state, buffers=((f"gradients in the masters' dtype, {CLOSING}", sizes.trained * widths.master),))


def combine(answers: Mapping[str, Estimate | None], sizes: Sizes) -> Estimate:
    """All answers as one; ``replicated`` where no plugin tells the model state.

    Raises:
        PluginError: two plugins tell it.
    """
    given = {name: answer for name, answer in answers.items() if answer is not None}
    owners = [name for name, answer in given.items() if answer.state is not None]
    if len(owners) > 1:
        raise PluginError(
            owners[1], "estimate", f"tells the model state, and '{owners[0]}' does too: leave `state` to who owns it"
        )
    parts = list(given.values()) if owners else [replicated(sizes), *given.values()]
    if sizes.borrowed:
        widths = sizes.widths
        held = sum(each.elements * (widths.param + widths.gradient * each.trains) for each in sizes.borrowed)
        parts.append(Estimate(buffers=(("copies of another stage's parameters, with gradients", held),)))
    return Estimate(
        next(part.state for part in parts if part.state is not None),
        tuple(buffer for part in parts for buffer in part.buffers),
        tuple(entry for part in parts for entry in part.sent),
        tuple(note for part in parts for note in part.notes),
    )
