"""Whose the memory is that exists before a window, by address: parameters, state, buffers, what plugins keep."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from camshaft.profiling.memory import BUFFER, GRADIENT, MASTER, PARAMETER, STATE, Held

if TYPE_CHECKING:
    from camshaft.host import Host
    from camshaft.state import State

_DEPTH = 6
_SKIPPED = (torch.nn.Module, torch.optim.Optimizer)
Named = tuple[str, str, Tensor]


def held(host: Host, state: State) -> list[Held]:
    """Every storage on this rank's device that a parameter, part, optimizer, buffer or plugin points at, once.

    The first kind in this order names it: so a flat buffer that parameters are views of is theirs.
    """
    found: dict[int, tuple[int, str, list[str]]] = {}
    for category, name, tensor in (*_of_model(state), *_of_optimizer(state), *_of_plugins(host)):
        address, size = _storage(tensor)
        if address and size and tensor.device.type == state.world.device.type:
            _, kind, names = found.setdefault(address, (size, category, []))
            if kind == category and name not in names:
                names.append(name)
    return [Held(address, size, kind, _together(names)) for address, (size, kind, names) in found.items()]


def gradients(state: State) -> dict[int, str]:
    """Address to name of every gradient there is now."""
    found: dict[int, list[str]] = {}
    for name, tensor in _gradients(state):
        found.setdefault(_storage(tensor)[0], []).append(name)
    return {address: _together(names) for address, names in found.items() if address}


def _gradients(state: State) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in state.named_parameters().items():
        if parameter.grad is not None:
            yield name, parameter.grad
    for part in state.world.parts:
        if part.tensor.grad is not None:
            yield _part_name(part), part.tensor.grad


def _of_model(state: State) -> Iterator[Named]:
    for name, parameter in state.named_parameters().items():
        yield PARAMETER, name, parameter.detach()
    for parts in (state.world.parts, state.world.stored):
        for part in parts:
            yield MASTER, _part_name(part), part.tensor.detach()
    for name, gradient in _gradients(state):
        yield GRADIENT, name, gradient
    for name, buffer in state.model.named_buffers():
        yield BUFFER, name, buffer


def _of_optimizer(state: State) -> Iterator[Named]:
    names = {id(part.tensor): _part_name(part) for part in state.world.parts}
    for tensor, entries in state.optimizer.state.items():
        for key, value in entries.items() if isinstance(entries, Mapping) else ():
            for each in _tensors(value, "", 2, set()):
                yield STATE, f"{key} of {names.get(id(tensor), 'a tensor')}", each


def _of_plugins(host: Host) -> Iterator[Named]:
    """Tensors in the plugins' own objects, as deep as their own classes go."""
    for name, plugin in host.plugins.items():
        package = type(plugin).__module__.partition(".")[0]
        for tensor in _tensors(plugin, package, _DEPTH, set()):
            yield BUFFER, f"plugin {name}", tensor


def _tensors(value: Any, package: str, depth: int, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    if depth == 0 or id(value) in seen or isinstance(value, (*_SKIPPED, str, bytes, int, float)):
        return
    seen.add(id(value))
    for child in _children(value, package):
        yield from _tensors(child, package, depth - 1, seen)


def _children(value: Any, package: str) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    if package and type(value).__module__.partition(".")[0] == package:
        slots = [name for each in type(value).__mro__ for name in _slots(each)]
        return [*getattr(value, "__dict__", {}).values(), *(getattr(value, name, None) for name in slots)]
    return ()


def _slots(kind: type) -> Iterable[str]:
    found = kind.__dict__.get("__slots__", ())
    return (found,) if isinstance(found, str) else (name for name in found if name not in ("__dict__", "__weakref__"))


def _storage(tensor: Tensor) -> tuple[int, int]:
    """Address and bytes of what a tensor lies in on this rank; 0 for one without memory."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    if local.is_meta:
        return 0, 0
    try:
        storage = local.untyped_storage()
    except (NotImplementedError, RuntimeError):  # a layout without one storage, a subclass without any
        return 0, 0
    return storage.data_ptr(), storage.nbytes()


def _part_name(part: Any) -> str:
    return _together([piece.name for piece in part.pieces]) if part.pieces else "padding"


def _together(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
