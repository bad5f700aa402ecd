"""Looking at checkpoints from outside a run, for tools: what is in one, and whether it is intact. No torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from camshaft.errors import CheckpointError
from camshaft_checkpoint import folders, manifest


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a checkpoint holds, without reading its tensors.

    ``path`` is a ``step_N`` folder, or a folder of them (then the newest). The result has ``path``, ``step``,
    ``world_size``, ``bytes``, ``files`` (name to size), ``state`` (counters), ``origin`` (versions, digests) and
    ``tensors``: name to ``{"dtype", "shape", "pieces", "bytes"}`` with dtypes named as in safetensors.

    Raises:
        CheckpointError: there is none, or its manifest or index is damaged.
    """
    folder = find(Path(path))
    found = manifest.read(folder)
    table = manifest.read_index(folder, found)
    return {
        "path": str(folder),
        "step": found.step,
        "world_size": found.world_size,
        "bytes": found.size,
        "files": {record.name: record.size for record in found.files},
        "state": table.document.get("state", {}),
        "origin": table.document.get("origin", {}),
        "tensors": {
            name: {
                "dtype": stored.dtype,
                "shape": list(stored.shape),
                "pieces": len(stored.pieces),
                "bytes": stored.size,
            }
            for name, stored in sorted(table.tensors.items())
        },
    }


def verify(path: str | os.PathLike[str]) -> list[str]:
    """Read every byte of a checkpoint and return its faults, each with the file it is in; empty when it is intact."""
    try:
        return manifest.verify(find(Path(path)))
    except CheckpointError as error:
        return [str(error)]


def find(path: Path) -> Path:
    """``path`` itself when it is a checkpoint, else the newest inside.

    Raises:
        CheckpointError: there is none.
    """
    if (path / manifest.NAME).exists() or manifest.folder_step(path) is not None:
        return path
    inside = folders.complete(path)
    if not inside:
        raise CheckpointError(f"there is no checkpoint at {path}")
    return inside[0]
