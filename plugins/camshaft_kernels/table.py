"""Measured times, by which ``auto`` chooses, and rules for what nobody has measured. Without torch.

A table is a JSON file for one kind of device (``cpu``, ``cuda:9.0``), written by ``camshaft bench kernels`` into the
folder ``kernels`` of the user's cache folder (``$XDG_CACHE_HOME/camshaft``, else ``~/.cache/camshaft``). It comes
before a table that is shipped in ``tables``. Each row has the milliseconds of forward and backward of one operation,
for one dtype and number of elements, by provider; a run takes the row whose size is nearest to its own, as a ratio.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from camshaft.data.cache import folder
from camshaft.errors import MachineError

FORMAT = 1
SHIPPED = Path(__file__).parent / "tables"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement: ``size`` elements of the operation's largest tensor (logits for losses, else scores)."""

    op: str
    dtype: str
    size: int
    shape: str
    ms: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Table:
    """Every measurement of one machine. ``machine``: what it is, in names and versions."""

    device: str
    machine: Mapping[str, str]
    rows: tuple[Row, ...]
    source: str = ""

    def nearest(self, op: str, dtype: str, size: int) -> Row | None:
        """The row for that operation and dtype whose size is nearest; None: nobody measured it."""
        rows = [row for row in self.rows if (row.op, row.dtype) == (op, dtype)]
        return min(rows, key=lambda row: abs(math.log(row.size / max(size, 1))), default=None)

    def dumps(self) -> str:
        """The file's text."""
        rows = ",\n".join(f"  {json.dumps(asdict(row))}" for row in self.rows)
        head = json.dumps({"format": FORMAT, "device": self.device, "machine": dict(self.machine)}, indent=1)
        return f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'


def place(device: str, environ: Mapping[str, str] | None = None) -> Path:
    """Where the user's own table for ``device`` is.

    Raises:
        MachineError: the user has no folder for such things.
    """
    return folder(None, os.environ if environ is None else environ) / "kernels" / f"{device.replace(':', '-')}.json"


def load(device: str) -> Table | None:
    """The user's own table for ``device``, else the shipped one, else None. A table that cannot be read is told."""
    try:
        own: Path | None = place(device)
    except MachineError:
        own = None
    for path in (own, SHIPPED / f"{device.replace(':', '-')}.json"):
        if path is not None and path.is_file():
            found = read(path, device)
            if found is not None:
                return found
    return None


def read(path: Path, device: str) -> Table | None:
    """The table for ``device`` in a file; None, and a warning, where there is none that can be read."""
    try:
        tree: Any = json.loads(path.read_text(encoding="utf-8"))
        if tree["format"] != FORMAT or tree["device"] != device:
            raise ValueError(f"format {tree['format']} for {tree['device']}")
        rows = tuple(_row(entry) for entry in tree["rows"])
        return Table(device, {str(key): str(value) for key, value in tree["machine"].items()}, rows, str(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning(
            "%s is no table of kernels (%s), and is left out: `camshaft bench kernels` writes a new one", path, error
        )
        return None


def _row(entry: Any) -> Row:
    times = {str(provider): float(ms) for provider, ms in entry["ms"].items()}
    size = int(entry["size"])
    if size < 1 or not times or not all(ms > 0 for ms in times.values()):
        raise ValueError(f"a row of {entry['op']} has no size or no times")
    return Row(str(entry["op"]), str(entry["dtype"]), size, str(entry["shape"]), times)


@dataclass(frozen=True, slots=True)
class Rule:
    """Providers in the order in which they are taken where nobody measured, and why."""

    order: tuple[str, ...]
    why: str


@cache
def rules() -> Mapping[str, Mapping[str, Rule]]:
    """Device type to operation to rule. What has no rule stays as it is."""
    tree = json.loads((SHIPPED / "rules.json").read_text(encoding="utf-8"))
    return {
        device: {op: Rule(tuple(rule["order"]), rule["why"]) for op, rule in ops.items()}
        for device, ops in tree.items()
    }
