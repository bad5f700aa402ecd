"""Who changed which tensor: weights, gradients and optimizer state before and after each hook of one plugin."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from camshaft.claims import Plan
from camshaft.host import Host
from camshaft.state import State

WEIGHTS, GRADIENTS, OPTIMIZER = "weights", "gradients", "optimizer state"
EVERYTHING = frozenset({WEIGHTS, GRADIENTS, OPTIMIZER})
BY_HOOK = {
    "post_reduce": {GRADIENTS},
    "clip": {GRADIENTS},
    "step": {WEIGHTS, OPTIMIZER},
    "release": {GRADIENTS},
    "load": EVERYTHING,
    "post_load": EVERYTHING,
    "load_state_dict": EVERYTHING,
}
"""What a hook is there to change, whoever implements it; all other hooks change what their plugin claims."""
TRAVELLING = frozenset({"pre_forward", "post_backward", "reduce"})
"""Hooks during which an owner may be summing gradients already: their bits change while another plugin's hook runs.
``debug.contracts``, under which the kit runs every plugin too, tells by version counters who writes them."""
BY_CLAIM = {
    "parameter.layout": {WEIGHTS, GRADIENTS},
    "gradient.layout": {GRADIENTS},
    "gradient.reduce": {GRADIENTS},
    "optimizer.layout": EVERYTHING,
}

Held = dict[tuple[str, str], Tensor | None]


def allowed(hook: str, plan: Plan) -> frozenset[str]:
    """Kinds of tensors that ``hook`` of a plugin with ``plan`` may write."""
    found = set(BY_HOOK.get(hook, ()))
    if hook in TRAVELLING:
        found.add(GRADIENTS)
    for claim in plan.claims:
        found |= BY_CLAIM.get(claim.resource, set())
    return frozenset(found)


@contextmanager
def watched(plugin: str, plan: Plan) -> Iterator[list[str]]:
    """Hosts that are made inside report what hooks of ``plugin`` write without a right to; one line for each."""
    found: list[str] = []
    original = Host.implementations

    def implementations(self: Host, hook: str) -> list[tuple[str, Callable[..., Any]]]:
        pairs = original(self, hook)
        free = allowed(hook, plan)
        return [(name, _watch(hook, call, plugin, free, found) if name == plugin else call) for name, call in pairs]

    Host.implementations = implementations  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Host.implementations = original  # type: ignore[method-assign]


def _watch(
    hook: str, call: Callable[..., Any], plugin: str, free: frozenset[str], found: list[str]
) -> Callable[..., Any]:
    def watching(*arguments: Any) -> Any:
        state = arguments[0] if arguments else None
        if not isinstance(state, State) or free == EVERYTHING:
            return call(*arguments)
        before = _copies(state, free)
        result = call(*arguments)
        found.extend(f"{hook} at step {state.step} {line}" for line in _changes(before, _held(state, free), plugin))
        return result

    return watching


def _held(state: State, free: frozenset[str]) -> Held:
    """Everything that is not free to change, by kind and name."""
    found: Held = {}
    for name, parameter in state.model.named_parameters():
        found[WEIGHTS, name], found[GRADIENTS, name] = parameter, parameter.grad
    for part in state.world.parts:
        name = "+".join(piece.name for piece in part.pieces) or "a part without pieces"
        found[WEIGHTS, f"part {name}"], found[GRADIENTS, f"part {name}"] = part.tensor, part.tensor.grad
        entries: Mapping[str, Any] = state.optimizer.state.get(part.tensor, {})
        for key, value in entries.items():
            if isinstance(value, Tensor):
                found[OPTIMIZER, f"{name}/{key}"] = value
    return {place: value for place, value in found.items() if place[0] not in free}


def _copies(state: State, free: frozenset[str]) -> Held:
    held = _held(state, free)
    return {place: None if value is None else value.detach().clone() for place, value in held.items()}


def _changes(before: Held, after: Held, plugin: str) -> Iterator[str]:
    """What differs. New optimizer state is the plugin's own where its key begins with the plugin's name."""
    for place, value in after.items():
        if place not in before:
            if not place[1].rpartition("/")[2].startswith(f"{plugin}."):
                yield f"added {place[0]} '{place[1]}'"
        elif not place[1].rpartition("/")[2].startswith(f"{plugin}.") and not _same(before[place], value):
            yield f"changed {place[0]} '{place[1]}'"
    for place in before.keys() - after.keys():
        yield f"removed {place[0]} '{place[1]}'"


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    if one.shape != other.shape:
        return False
    # NaN equals itself
    both = one.ne(one) & other.ne(other)
    return one.dtype == other.dtype and bool((one.eq(other) | both).all())
