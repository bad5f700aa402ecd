"""Papers of a run that go to W&B on demand, as messages for the worker: all are texts, and small.

``recipe`` and ``plan`` are there from the start, ``certificate`` where a proof of the recipe exists; ``ledger`` and
``schedule`` are what other plugins leave in records and files, so they go at the end.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

Paper = Literal["recipe", "certificate", "ledger", "schedule", "plan"]
Message = dict[str, Any]
_LEDGER = "plugin/ledger/"
_PER_STEP = "/bytes_per_step"


def at_start(wanted: Sequence[Paper], run: Path, name: str) -> Iterator[Message]:
    """Messages for what exists when a run begins. ``run``: its directory; ``name``: the recipe's."""
    status = _json(run / "status.json")
    if "recipe" in wanted:
        files = {file: _text(run / file) for file in ("recipe.yaml", "resolved.yaml")}
        yield from _artifact(f"{name}-recipe", "recipe", files)
    if "certificate" in wanted:
        text = _text(run / "certificate.json") or _dumped(status.get("certificate"))
        yield from _artifact(f"{name}-certificate", "certificate", {"certificate.json": text})
    if "plan" in wanted:
        line = plan_line(str(status.get("command", "")), status.get("world_size"))
        if line is None:
            yield {"missing": "plan"}
        else:
            yield {"command": {"name": f"{name}-plan", "type": "plan", "file": "plan.txt", "line": line}}


def at_end(wanted: Sequence[Paper], run: Path, name: str, record: Mapping[str, float | int]) -> Iterator[Message]:
    """Messages for what exists when a run ends; ``record``: the last one of training."""
    if "ledger" in wanted:
        rows = ledger_rows(record)
        if rows:
            columns = ["plugin", "axis", "operation", "calls a step", "bytes a step"]
            yield {"table": {"key": "ledger", "columns": columns, "rows": rows}}
        yield from _artifact(f"{name}-ledger", "ledger", {"ledger.json": _text(run / "ledger.json")}, quiet=bool(rows))
    if "schedule" in wanted:
        drawings = {path.name: _text(path) for path in sorted(run.glob("*.svg"))}
        yield from _artifact(f"{name}-schedule", "schedule", drawings)
        for file, text in drawings.items():
            if text:
                yield {"html": {"key": f"schedule/{Path(file).stem}", "text": text}}


def ledger_rows(record: Mapping[str, float | int]) -> list[list[str | float]]:
    """(plugin, axis, operation, calls, bytes) a step, of what the ledger put into a record."""
    rows: list[list[str | float]] = []
    for key, count in record.items():
        where = key.removeprefix(_LEDGER).removesuffix(_PER_STEP)
        if key.startswith(_LEDGER) and key.endswith(_PER_STEP) and where.count("/") == 2:
            calls = record.get(f"{_LEDGER}{where}/calls_per_step", 0)
            rows.append([*where.split("/"), float(calls), float(count)])
    return sorted(rows, key=lambda row: -float(row[-1]))


def plan_line(command: str, world_size: Any) -> list[str] | None:
    """The line that shows the plan of the run that ``command`` started; None if that is no start of ours."""
    try:
        words = shlex.split(command)
    except ValueError:
        return None
    for place in range(len(words) - 2):
        if words[place : place + 2] == ["camshaft", "train"]:
            rest = [word for word in words[place + 2 :] if not word.startswith("-")]
            size = ["--world-size", str(world_size)] if world_size else []
            return [sys.executable, "-P", "-m", "camshaft", "plan", *rest, *size]
    return None


def _artifact(name: str, kind: str, files: Mapping[str, str], *, quiet: bool = False) -> Iterator[Message]:
    found = {file: text for file, text in files.items() if text}
    if found:
        yield {"artifact": {"name": name, "type": kind, "files": found}}
    elif not quiet:
        yield {"missing": kind}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_text(path) or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _dumped(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n" if value else ""
