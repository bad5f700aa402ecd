"""Nothing enabled does nothing: after its first step a run asks which plugins have had an effect so far.

What counts without a word from the plugin: a slot or another hook of its that ran. A plugin that implements ``inert``
is asked instead, and knows better.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from camshaft.errors import PluginError, Problem, RecipeError
from camshaft.hookspecs import FAMILIES
from camshaft.host import Host
from camshaft.state import State

LATER = frozenset(
    {
        "plan", "shapes", "misfits", "activations", "estimate", "kernels", "handlers", "inert", "state_dict",
        "load_state_dict", "post_load", "close",
    }
)  # fmt: skip
"""Hooks that change nothing, or that need never run. Records are logged and checkpoints saved by every run that
ends.
"""

Reasons = Mapping[str, str]
"""Plugin to why it had no effect."""


def check(host: Host, state: State, actors: Collection[str]) -> None:
    """Stop the run, on all ranks alike, if a plugin has had no effect on any of them. Collective.

    ``actors``: plugins whose handlers the program has called.

    Raises:
        RecipeError: one problem for each plugin that did nothing.
    """
    own = reasons(host, state, actors)
    state.control.start((len(own),))
    (found,) = state.control.finish()
    if found:
        raise RecipeError(_problems(_from_all_ranks(own, state.world.world_size), state))


def reasons(host: Host, state: State, actors: Collection[str]) -> dict[str, str]:
    """Plugins that did nothing on this rank, in recipe order, each with its reason."""
    answers = host.call("inert", state)
    told = {name: _expect(name, answer) for name, answer in answers}
    active = {*actors, *state.world.givers}
    silent = {name: None if name in active else _without_effect(host, name) for name in host.plugins}
    return {name: reason for name, reason in (silent | told).items() if reason is not None}


def _expect(name: str, answer: Any) -> str | None:
    if answer is not None and not (isinstance(answer, str) and answer):
        raise PluginError(name, "inert", f"must return a reason or None, got {answer!r}")
    return answer


def _without_effect(host: Host, name: str) -> str | None:
    hooks = [hook for hook in _hooks() if name in dict(host.implementations(hook))]
    if set(hooks) - LATER:
        return None
    if "kernels" in hooks:
        return "none of the implementations of operations that it offers was taken, or weighed against others"
    only = f"only {', '.join(hooks)}" if hooks else "no hook"
    return f"it implements {only}, and nothing that runs before the first step ends"


def _hooks() -> list[str]:
    return [name for family in FAMILIES for name in vars(family) if not name.startswith("_")]


def _from_all_ranks(own: Reasons, world_size: int) -> list[Reasons]:
    if world_size == 1:
        return [own]
    import torch.distributed as dist

    everyone: list[Any] = [None] * world_size
    dist.all_gather_object(everyone, own)
    return everyone


def _problems(everyone: list[Reasons], state: State) -> list[Problem]:
    """One problem for a plugin and reason; where not all ranks see it, with those that do."""
    ranks: dict[tuple[str, str], list[int]] = {}
    for rank, found in enumerate(everyone):
        for pair in found.items():
            ranks.setdefault(pair, []).append(rank)
    return [
        Problem(
            f"did nothing by the end of step {state.step}{_where(members, len(everyone))}: {reason}",
            key=f"plugins.{name}",
            fix=f"change what the reason names, or remove it, for example with plugins.{name}=null",
        )
        for (name, reason), members in ranks.items()
    ]


def _where(members: list[int], world_size: int) -> str:
    if len(members) == world_size:
        return ""
    return f" on rank(s) {', '.join(map(str, members[:8]))}{', ...' if len(members) > 8 else ''}"
