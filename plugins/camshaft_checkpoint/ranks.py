"""Agreement between ranks on a group of their own, so that a failure of one is an error of all, never a hang."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from camshaft.errors import CheckpointError, MachineError

T = TypeVar("T")


class Ranks:
    """All ranks of the run over a gloo group that nothing else uses; with one process, no group at all.

    The group is separate because an asynchronous save talks while training does.
    """

    def __init__(self, timeout_s: float) -> None:
        many = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)) if many else None
        self.rank: int = dist.get_rank() if many else 0
        self.size: int = dist.get_world_size() if many else 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def everywhere(self, function: Callable[[], T]) -> T:
        """Run ``function`` on every rank; if it fails anywhere, raise everywhere, naming rank and reason.

        Raises:
            CheckpointError: the first failing rank raised one.
            MachineError: it raised anything else.
        """
        result, error = _attempt(function)
        self._raise_any(error, self.share(None if error is None else _describe(error)))
        return result  # type: ignore[return-value]  # no error anywhere, so there is a result

    def on_main(self, function: Callable[[], T]) -> T:
        """Run ``function`` on rank 0 and give every rank its result, or its error."""
        box = [self.on_main_keep(function)]
        if self.group is not None:
            dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]  # type: ignore[return-value]

    def on_main_keep(self, function: Callable[[], T]) -> T | None:
        """Like ``on_main``, but the result stays on rank 0 (None elsewhere); only an error is sent."""
        result, error = _attempt(function) if self.is_main else (None, None)
        box = [None if error is None else _describe(error)]
        if self.group is not None:
            dist.broadcast_object_list(box, src=0, group=self.group)
        self._raise_any(error, box)
        return result

    def share(self, value: T) -> list[T]:
        """Every rank's value, on every rank, by rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def union(self, names: set[str]) -> set[str]:
        """All ranks' names, on every rank."""
        return set[str]().union(*self.share(names))

    def collect(self, value: T) -> list[T] | None:
        """Every rank's value by rank, on rank 0; None elsewhere."""
        if self.group is None:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(value, values, dst=0, group=self.group)
        return values

    def deal(self, values: list[T] | None) -> T:
        """Give each rank its item of the list that rank 0 has."""
        if self.group is None:
            assert values is not None
            return values[0]
        box: list[Any] = [None]
        dist.scatter_object_list(box, values, src=0, group=self.group)
        value: T = box[0]
        return value

    def _raise_any(self, own: Exception | None, failures: list[tuple[bool, str] | None]) -> None:
        found = [(rank, failure) for rank, failure in enumerate(failures) if failure is not None]
        if not found:
            return
        if len(found) == 1 and isinstance(own, MachineError):
            raise own
        kind = CheckpointError if found[0][1][0] else MachineError
        lines = [text if self.size == 1 else f"rank {rank}: {text}" for rank, (_, text) in found]
        raise kind("\n".join(lines)) from own


def _attempt(function: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return function(), None
    except Exception as error:  # carried to every rank and raised there
        return None, error


def _describe(error: Exception) -> tuple[bool, str]:
    text = str(error) if isinstance(error, MachineError) else f"{type(error).__name__}: {error}"
    return isinstance(error, CheckpointError), text
