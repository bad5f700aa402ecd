"""Ranges that tell a trace what the run is doing: phases, modules, collectives; there only while it is recorded."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import Module
from torch.profiler import record_function

from camshaft.comm import Channel, Pending
from camshaft.profiling.trace import BLOCKED, MODULE, PHASE, START, WAIT
from camshaft.step import Bound, Handler, Stepper

_HOOK_ARGUMENT = {
    "all_reduce": 1,
    "reduce_scatter": 2,
    "all_gather": 2,
    "all_to_all": 2,
    "broadcast": 2,
    "messages": 1,
}  # fmt: skip
"""Collectives of a channel, and where among their arguments the hook is."""


class _Told(Pending):
    """A collective under way whose wait is a range of its own."""

    __slots__ = ("_inner", "_label")

    def __init__(self, inner: Pending, label: str) -> None:
        super().__init__(())
        self._inner, self._label = inner, label

    def wait(self) -> None:
        with record_function(self._label):
            self._inner.wait()


@contextmanager
def collectives() -> Iterator[None]:
    """Ranges for the start of each collective of a channel, for the wait, and for every time that a thread is blocked
    in a wait, whoever started what it waits for.
    """
    methods = {name: getattr(Channel, name) for name in _HOOK_ARGUMENT}
    wait = dist.Work.wait  # the one place that every wait for gloo or nccl comes through, ours and other libraries'

    @functools.wraps(wait)
    def blocked(work: Any, *arguments: Any, **named: Any) -> Any:
        with record_function(BLOCKED):
            return wait(work, *arguments, **named)

    for name, method in methods.items():
        setattr(Channel, name, _labelled(name, method))
    dist.Work.wait = blocked  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        dist.Work.wait = wait  # type: ignore[method-assign]
        for name, method in methods.items():
            setattr(Channel, name, method)


def _labelled(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    position = _HOOK_ARGUMENT[name]

    @functools.wraps(method)
    def call(channel: Channel, *arguments: Any, **named: Any) -> Any:
        hook = named.get("hook") or (arguments[position] if len(arguments) > position else "")
        label = f"{channel.plugin}/{hook}/{name}/{channel.axis}"
        with record_function(START + label):
            started = method(channel, *arguments, **named)
        if isinstance(started, list):
            return [_Told(each, WAIT + label) for each in started]
        return _Told(started, WAIT + label)

    return call


@contextmanager
def phases(stepper: Stepper, before: Callable[[str], None]) -> Iterator[None]:
    """A range around every action of the program; ``before`` is told its phase first."""
    kept: Bound = stepper.program

    def around(handler: Handler, phase: str) -> Handler:
        def run(action: Any) -> None:
            before(phase)
            with record_function(PHASE + phase):
                handler(action)

        return run

    stepper.program = tuple((around(handler, phase), action, phase) for handler, action, phase in kept)
    try:
        yield
    finally:
        stepper.program = kept


class Modules:
    """A range around each forward of each module, while ``on``; compiled code is left as it is."""

    def __init__(self, model: Module) -> None:
        self.on = False
        self._open: list[tuple[Module, Any]] = []
        self._handles = []
        for name, module in model.named_modules():
            if name:
                self._handles.append(module.register_forward_pre_hook(self._enter(name), prepend=True))
                self._handles.append(module.register_forward_hook(self._leave, always_call=True))

    def _enter(self, name: str) -> Callable[[Module, Any], None]:
        label = MODULE + name

        def enter(module: Module, _: Any) -> None:
            if torch.compiler.is_compiling() or not self.on:
                return
            span = record_function(label)
            span.__enter__()  # type: ignore[no-untyped-call]
            self._open.append((module, span))

        return enter

    def _leave(self, module: Module, *_: Any) -> None:
        if torch.compiler.is_compiling() or not self._open or self._open[-1][0] is not module:
            return
        self._open.pop()[1].__exit__(None, None, None)

    def remove(self) -> None:
        """Take every hook off again."""
        for handle in self._handles:
            handle.remove()


@contextmanager
def installed(stepper: Stepper, modules: Modules, before: Callable[[str], None]) -> Iterator[None]:
    """All of them."""
    with ExitStack() as stack:
        stack.enter_context(collectives())
        stack.enter_context(phases(stepper, before))
        modules.on = True
        stack.callback(setattr, modules, "on", False)
        yield
