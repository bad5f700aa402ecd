"""Reads wandb's run file: a log of length-prefixed protobuf records in blocks of 32 KiB (LevelDB's log format)."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BLOCK, _HEADER = 32768, 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


@dataclass
class RunFile:
    """What one run file holds."""

    id: str = ""
    project: str = ""
    name: str = ""
    sweep_id: str = ""
    tags: list[str] = field(default_factory=list)
    group: str = ""
    job_type: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, str] = field(default_factory=dict)
    """define_metric: name or glob to the name of its axis."""
    alerts: list[tuple[str, str, str]] = field(default_factory=list)
    """(title, text, level)."""
    artifacts: dict[str, dict[str, str]] = field(default_factory=dict)
    """``type:name`` to the text of each of its files."""
    exit_code: int | None = None


def read(path: Path) -> RunFile:
    """The parsed records of a ``run-ID.wandb`` file."""
    from wandb.proto import wandb_internal_pb2

    found = RunFile()
    for data in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        _add(found, record)
    return found


def run_files(run: Path) -> list[RunFile]:
    """Every offline run file below a run directory, the oldest first."""
    return [read(path) for path in sorted(run.glob("wandb/offline-run-*/run-*.wandb"))]


def _records(data: bytes) -> Iterator[bytes]:
    assert data[:4] == b":W&B"
    place, parts = _HEADER, b""
    while place + _HEADER <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < _HEADER:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + _HEADER])
        assert kind in (_FULL, _FIRST, _MIDDLE, _LAST), f"record type {kind} at byte {place}"
        place += _HEADER
        parts = data[place : place + length] if kind in (_FULL, _FIRST) else parts + data[place : place + length]
        place += length
        if kind in (_FULL, _LAST):
            yield parts


def _add(found: RunFile, record: Any) -> None:
    kind = record.WhichOneof("record_type")
    if kind == "run":
        run = record.run
        found.id, found.project, found.name = run.run_id, run.project, run.display_name
        found.sweep_id, found.tags = run.sweep_id, list(run.tags)
        found.group, found.job_type = run.run_group, run.job_type
        found.config |= _items(run.config.update)
    elif kind == "history":
        found.history.append(_items(record.history.item))
    elif kind == "metric":
        name = record.metric.glob_name or record.metric.name
        found.metrics[name] = record.metric.step_metric
    elif kind == "alert":
        found.alerts.append((record.alert.title, record.alert.text, record.alert.level))
    elif kind == "artifact":
        files = {entry.path: Path(entry.local_path) for entry in record.artifact.manifest.contents}
        texts = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
        found.artifacts[f"{record.artifact.type}:{record.artifact.name}"] = texts
    elif kind == "exit":
        found.exit_code = record.exit.exit_code


def _items(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
