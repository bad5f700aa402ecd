"""Results of chosen operations are kept from the first run of a module and given back in the second, by dispatch modes
around its forward (as in torch's selective checkpointing, which has these rules by name alone).

What may be kept is decided by the operation's nature: memory that is its own, no random numbers drawn. A kept result
that somebody writes into afterwards, or hands to a collective, is dropped again: the second run makes it anew.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from camshaft_recompute.kinds import Keep, draws, exchanges, shares
from camshaft_recompute.trees import address, mapped, storage_bytes, tensors


class Store:
    """Results of one call, by the number of the operation among those that may be kept."""

    def __init__(self, keep: Keep) -> None:
        self.keep = keep
        self.results: dict[int, Any] = {}

    @property
    def bytes(self) -> int:
        """Bytes that are held."""
        return sum(storage_bytes(tensors(list(self.results.values()))).values())

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
        self._results: dict[int, tuple[Any, int]] = {}
        self._at: dict[int, int] = {}
        """Address of each kept result to its number."""
        self._versions: list[tuple[int, Tensor, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._keeper.keep(func):
            if not draws(func, args, kwargs):
                self._take(result)
        elif self._at:
            if shares(func):
                self._watch(result)
            elif exchanges(func):
                self._give_up(args, kwargs)
        return result

    def _take(self, result: Any) -> None:
        places, place = self._keeper.places, self._count
        self._count += 1
        if places is not None and place not in places:
            return
        self._results[place] = result, self._saved()
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

    def settled(self) -> dict[int, Any]:
        """What is left: unwritten, and of operations that run before the last tensor is saved, which ends the second
        run.
        """
        written = {place for place, each, version in self._versions if each._version != version}
        last = self._saved()
        return {
            place: mapped(result, lambda each: each.detach())
            for place, (result, saved) in self._results.items()
            if place not in written and saved < last
        }

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
            if place in self._store.results:
                return mapped(self._store.results.pop(place), lambda each: each.detach())
        return func(*args, **kwargs)
