"""Binding: hook implementations become plain callables once, so that a step makes no pluggy call.

One pluggy call costs about 1.4 us with one implementation and 7.5 us with twenty; a bound callable 0.05 and 0.5 us.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from camshaft.errors import PluginError
from camshaft.host import Host


def event(host: Host, hook: str, first: str | None = None) -> Callable[..., None] | None:
    """All implementations of an event as one callable, or None if there are none; plugin ``first`` is called first."""
    found = sorted(host.implementations(hook), key=lambda item: item[0] != first)  # stable: the rest in recipe order
    calls = tuple(_watched(host, name, hook, function) for name, function in found)
    if len(calls) <= 1:
        return calls[0] if calls else None

    def fire(*arguments: Any) -> None:
        for call in calls:
            call(*arguments)

    return fire


def slot(host: Host, hook: str) -> Callable[..., Any] | None:
    """The owner's implementation of a slot, or None if nobody owns it."""
    owner = host.owner(hook)
    return None if owner is None else _watched(host, owner[0], hook, owner[1])


def _watched(host: Host, plugin: str, hook: str, function: Callable[..., Any]) -> Callable[..., Any]:
    return function if host.watch is None else host.watch.call(plugin, hook, function)


def middleware(host: Host, hook: str, state: Any, innermost: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``innermost`` by every implementation, once; the first plugin of the recipe ends up outermost."""
    call = innermost
    for name, found in reversed(host.implementations(hook)):
        wrap = found if host.watch is None else host.watch.wrap(name, hook, found)
        call = wrap(state, call)
        if not callable(call):
            raise PluginError(name, hook, f"must return a callable, got {type(call).__name__}")
    return call
