"""Collectives that libraries start inside: DTensor, fully_shard, DDP's C++ reducer, DeepSpeed, plain torch.distributed.

Every call on a process group, from Python or C++, goes through an operator of torch's ``c10d`` namespace. While a
``Tap`` is open, each of those has a kernel in Python on its way, at the one dispatch key that no context excludes
(autograd's would be missed below autograd), and that none of these operators uses.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from camshaft import comm
from camshaft.host import guard

Told = Callable[["Started"], None]


class Started(NamedTuple):
    """A collective that a library starts; ``away`` as in ``camshaft.comm.Call``."""

    op: str
    dtype: torch.dtype
    elements: int
    away: int | None
    group: ProcessGroup
    plugin: str
    hook: str


def _flat(tensors: Any) -> Iterator[Tensor]:
    if isinstance(tensors, Tensor):
        yield tensors
    elif isinstance(tensors, Sequence):
        for each in tensors:
            yield from _flat(each)


class _Shape(NamedTuple):
    """How an operator's arguments tell its size: which argument, and whether it is one rank's part of the whole."""

    op: str
    argument: int | None
    part: bool = False


_OPERATORS = {
    "allreduce_": _Shape("all_reduce", 0),
    "allreduce_coalesced_": _Shape("all_reduce", 0),
    "allgather_": _Shape("all_gather", 1, part=True),
    "allgather_coalesced_": _Shape("all_gather", 1, part=True),
    "_allgather_base_": _Shape("all_gather", 1, part=True),
    "allgather_into_tensor_coalesced_": _Shape("all_gather", 1, part=True),
    "reduce_scatter_": _Shape("reduce_scatter", 0, part=True),
    "_reduce_scatter_base_": _Shape("reduce_scatter", 0, part=True),
    "reduce_scatter_tensor_coalesced_": _Shape("reduce_scatter", 0, part=True),
    "reduce_": _Shape("reduce", 0),
    "broadcast_": _Shape("broadcast", 0),
    "gather_": _Shape("gather", 1, part=True),
    "scatter_": _Shape("scatter", 0, part=True),
    "alltoall_": _Shape("all_to_all", 1, part=True),
    "alltoall_base_": _Shape("all_to_all", 1, part=True),
    "send": _Shape("send", 0),
    "recv_": _Shape("recv", 0),
    "recv_any_source_": _Shape("recv", 0),
    "barrier": _Shape("barrier", None),
}
_KEY = "BackendSelect"


class Tap:
    """Tells ``told`` of every collective that starts outside of a channel, before it starts."""

    def __init__(self, told: Told) -> None:
        self._told = told
        self._library: torch.library.Library | None = None

    def open(self) -> None:
        """Put the kernels in the way."""
        self._library = torch.library.Library("c10d", "IMPL")  # type: ignore[no-untyped-call]
        for name, shape in _OPERATORS.items():
            if hasattr(torch.ops.c10d, name):
                self._put(self._library, name, shape)

    def close(self) -> None:
        """Take them back: without its library a kernel is gone."""
        self._library = None

    def _put(self, library: torch.library.Library, name: str, shape: _Shape) -> None:
        operator = getattr(torch.ops.c10d, name).default
        here = getattr(torch._C.DispatchKey, _KEY)

        def kernel(keyset: Any, *arguments: Any) -> Any:
            if not comm.starting():
                self._told(_read(shape, arguments))
            # This lets go of the interpreter's lock, as torch.distributed does: with it gloo would block for good,
            # since its threads need it to free tensors while they hold the lock of the queue.
            return operator.redispatch(keyset.remove(here), *arguments)

        library.impl(name, kernel, _KEY, with_keyset=True)  # type: ignore[no-untyped-call]


def _read(shape: _Shape, arguments: Sequence[Any]) -> Started:
    script = next(each for each in arguments if isinstance(each, torch.ScriptObject))
    group = ProcessGroup.unbox(script)
    tensors = list(_flat(arguments[shape.argument])) if shape.argument is not None else []
    elements = sum(tensor.numel() for tensor in tensors)
    away = _away(arguments, tensors, group) if shape.op == "all_to_all" else None
    if shape.part:
        elements *= group.size()
    dtype = tensors[0].dtype if tensors else torch.uint8
    return Started(shape.op, dtype, elements, away, group, *_who())


def _away(arguments: Sequence[Any], tensors: list[Tensor], group: ProcessGroup) -> int:
    """What an all-to-all sends to others: its inputs but this rank's own, which lengths or the list tell apart."""
    total = sum(tensor.numel() for tensor in tensors)
    if isinstance(arguments[1], Tensor):
        lengths = arguments[4] if len(arguments) > 4 else ()
        rows = max(arguments[1].shape[0], 1) if arguments[1].ndim else 1
        return total - (lengths[group.rank()] * (total // rows) if lengths else total // group.size())
    return total - tensors[group.rank()].numel()


_GUARD = guard("", "", lambda: None).__code__
_TORCH = ("torch.distributed.distributed_c10d", "torch.distributed.c10d_logger")


def _who() -> tuple[str, str]:
    """Plugin and hook: of code of ours that asked torch.distributed itself; else of the hook that is running.

    ``library`` where neither is the case, in forward or backward for example.
    """
    frame: FrameType | None = sys._getframe(2)
    direct, plugin = True, ""
    while frame is not None:
        if frame.f_code is _GUARD:
            known = frame.f_locals
            return plugin or known["plugin"], known["hook"]
        module = frame.f_globals.get("__name__", "")
        if direct and module not in _TORCH and module != __name__ and module != "contextlib":
            direct, plugin = False, _owner(module)
        frame = frame.f_back
    return plugin or "library", ""


def _owner(module: str) -> str:
    head, _, rest = module.partition(".")
    if head.startswith("camshaft_"):
        return head.removeprefix("camshaft_")
    return "" if head != "camshaft" else "testing" if rest.startswith("testing") else "core"


def in_background() -> bool:
    """Whether this is a thread that Python code started beside the main one; threads of autograd are not."""
    thread = threading.current_thread()
    return thread is not threading.main_thread() and not thread.name.startswith("Dummy-")
