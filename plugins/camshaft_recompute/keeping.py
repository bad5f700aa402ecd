"""Results of chosen operations are kept from the first run of a module and given back in the second, by dispatch modes
around its forward (as in torch's selective checkpointing, which has these rules by name alone).

What may be kept is decided by the operation's nature: memory that is its own, no random numbers drawn. A kept result
that somebody writes into afterwards, in the module or behind it, or that the module hands to a collective, is not given
back: the second run makes it anew. Writes that torch is not told of, by a kernel that gets an address, nobody sees:
results that are mostly made for that, copies and filled memory, are not kept at all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from camshaft_recompute.kinds import Keep, Operation, draws, exchanges, name_of, shares
from camshaft_recompute.trees import address, mapped, storage_bytes, tensors


class Kept(NamedTuple):
    """One operation's result, and the version of each of its tensors when the module was through."""

    operation: Operation
    result: Any
    versions: tuple[int, ...]

    @property
    def unwritten(self) -> bool:
        """Whether nobody has written into it since."""
        return self.versions == _versions(self.result)


def _versions(result: Any) -> tuple[int, ...]:
    return tuple(each._version for each in tensors(result))


class Store:
    """Results of one call, by the number of the operation among those that may be kept."""

    def __init__(self, keep: Keep) -> None:
        self.keep = keep
        self.results: dict[int, Kept] = {}

    @property
    def bytes(self) -> int:
        """Bytes that are held."""
        return sum(storage_bytes(tensors([each.result for each in self.results.values()])).values())

    def second(self) -> _Second:
        """A mode that gives the results back, each once."""
        return _Second(self)


class Keeper:
    """Which results to keep of every call of a module.

    ``places``: numbers of operations among those that ``keep`` names; None: all of them.
    """

    def __init__(self, keep: Keep, places: Collection[int] | None = None) -> None:
        self.keep, self.places = keep, None if places is None else frozenset(places)

    @contextmanager
    def first(self, saved: Callable[[], int]) -> Iterator[Store]:
        """The mode of the first run; ``saved`` tells how many tensors autograd has saved so far."""
        store, mode = Store(self.keep), _First(self, saved)
        try:
            with mode:
                yield store
            store.results = mode.settled()
        finally:
            mode.clear()


class _First(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, keeper: Keeper, saved: Callable[[], int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._keeper, self._saved = keeper, saved
        self._count = 0
        self._results: dict[int, tuple[Operation, Any, int]] = {}
        self._at: dict[int, int] = {}
        """Address of each kept result to its number."""
        self._versions: list[tuple[int, Tensor, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._keeper.keep(func):
            if not draws(func, args, kwargs):
                self._take(func, result)
        elif self._at:
            if shares(func):
                self._watch(result)
            elif exchanges(func):
                self._give_up(args, kwargs)
        return result

    def _take(self, operation: Operation, result: Any) -> None:
        places, place = self._keeper.places, self._count
        self._count += 1
        if places is not None and place not in places:
            return
        self._results[place] = operation, result, self._saved()
        for each in tensors(result):
            self._at[address(each)] = place
            self._versions.append((place, each, each._version))

    def _watch(self, result: Any) -> None:
        for each in tensors(result):
            place = self._at.get(address(each))
            if place is not None:
                self._versions.append((place, each, each._version))

    def _give_up(self, args: Any, kwargs: Any) -> None:
        for each in tensors([args, kwargs]):
            self._results.pop(self._at.get(address(each), -1), None)

    def settled(self) -> dict[int, Kept]:
        """What is left: unwritten, and of operations that run before the last tensor is saved, which ends the second
        run.
        """
        written = {place for place, each, version in self._versions if each._version != version}
        last, found = self._saved(), dict[int, Kept]()
        for place, (operation, result, saved) in self._results.items():
            if place not in written and saved < last:
                held = mapped(result, lambda each: each.detach())  # which counts versions with what it is detached from
                found[place] = Kept(operation, held, _versions(held))
        return found

    def clear(self) -> None:
        """Let go of results that know their graph."""
        self._results, self._at, self._versions = {}, {}, []


class _Second(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, store: Store) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._store, self._count = store, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._store.keep(func) and not draws(func, args, kwargs):
            place = self._count
            self._count += 1
            kept = self._store.results.pop(place, None)
            if kept is not None and kept.operation is not func:
                raise RuntimeError(
                    f"a module that runs again calls {name_of(func)} where its first run had called "
                    f"{name_of(kept.operation)}: its forward depends on more than its inputs, parameters and random "
                    "numbers; leave it out of plugins.recompute.modules"
                )
            if kept is not None and kept.unwritten:
                return mapped(kept.result, lambda each: each.detach())
        return func(*args, **kwargs)
