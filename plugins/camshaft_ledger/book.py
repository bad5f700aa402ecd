"""Counts: calls and bytes by plugin, axis and operation, of the whole run and of the steps since the last record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class Key(NamedTuple):
    """What is counted apart."""

    plugin: str
    axis: str
    op: str


class Count(NamedTuple):
    """Calls, and the bytes that this rank sent for them by theory."""

    calls: int = 0
    bytes: float = 0.0


Counts = Mapping[Key, Count]


class Book:
    """What one rank sends. Steps are counted from ``begin`` on; what was called before is in the totals only."""

    def __init__(self) -> None:
        self._counts: dict[Key, Count] = {}
        self.steps = 0
        self.begin()

    def begin(self) -> None:
        """The first step begins."""
        self._begun: dict[Key, Count] = dict(self._counts)
        self._marked = self._seen = (self.steps, self._begun)

    def add(self, key: Key, size: float) -> None:
        """Count a call that sends ``size`` bytes from this rank."""
        calls, total = self._counts.get(key, (0, 0.0))
        self._counts[key] = Count(calls + 1, total + size)

    def metrics(self) -> dict[str, float]:
        """Means a step since the last ``mark``, by metric name; the step under way counts as done."""
        self._seen = (self.steps, dict(self._counts))
        since, before = self._marked
        found = _per_step(self._counts, before, max(self.steps - since, 1))
        named = {"/".join(key): count for key, count in found.items() if count.calls}
        metrics = {f"{name}/bytes_per_step": count.bytes for name, count in named.items()}
        metrics |= {f"{name}/calls_per_step": count.calls for name, count in named.items()}
        metrics["bytes_per_step"] = sum(count.bytes for count in found.values())
        metrics["calls_per_step"] = sum(count.calls for count in found.values())
        return {f"plugin/ledger/{name}": value for name, value in metrics.items()}

    def mark(self) -> None:
        """What ``metrics`` last said has been written: the next means begin there."""
        self._marked = self._seen

    def summary(self) -> dict[str, Any]:
        """The whole run as JSON values, the most bytes first."""
        steps = max(self.steps, 1)
        mean = _per_step(self._counts, self._begun, steps)
        rows = [
            {
                **key._asdict(),
                "calls_per_step": mean[key].calls,
                "bytes_per_step": mean[key].bytes,
                "calls": count.calls,
                "bytes": count.bytes,
            }
            for key, count in self._counts.items()
        ]
        return {"steps": self.steps, "rows": sorted(rows, key=lambda row: (-row["bytes"], -row["calls"]))}


class _Mean(NamedTuple):
    calls: float
    bytes: float


def _per_step(now: Counts, before: Counts, steps: int) -> dict[Key, _Mean]:
    nothing = Count()
    return {
        key: _Mean((calls - before.get(key, nothing).calls) / steps, (size - before.get(key, nothing).bytes) / steps)
        for key, (calls, size) in now.items()
    }


def table(summary: Mapping[str, Any]) -> str:
    """The summary as aligned columns, with a line of sums; bytes are those that one rank sends."""
    heads = ("plugin", "axis", "op", "calls/step", "sent/step", "calls", "sent")
    rows = [
        (row["plugin"], row["axis"], row["op"], _number(row["calls_per_step"]), size(row["bytes_per_step"]),
         str(row["calls"]), size(row["bytes"]))
        for row in summary["rows"]
    ]  # fmt: skip
    names = ("calls_per_step", "bytes_per_step", "calls", "bytes")
    sums = [sum(row[name] for row in summary["rows"]) for name in names]
    rows.append(("all", "", "", _number(sums[0]), size(sums[1]), str(sums[2]), size(sums[3])))
    widths = [max(len(row[column]) for row in (heads, *rows)) for column in range(len(heads))]
    return "\n".join(_line(row, widths) for row in (heads, *rows))


def _line(row: Iterable[str], widths: list[int]) -> str:
    cells = [cell.ljust(width) if column < 3 else cell.rjust(width)
             for column, (cell, width) in enumerate(zip(row, widths, strict=True))]  # fmt: skip
    return "  ".join(cells).rstrip()


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def size(count: float) -> str:
    """Bytes with a binary unit and four digits at most."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"
