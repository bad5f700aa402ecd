"""What this machine has: versions, GPUs, launchers. Names nobody and holds nothing of the environment."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGES = ("camshaft", "torch", "deepspeed", "tokenizers", "numpy", "safetensors", "pluggy", "pydantic")
"""Packages whose versions a run directory records, beside those that its plugins name."""


def version(package: str) -> str | None:
    """The installed version; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def has_module(name: str) -> bool:
    """Whether a module could be imported, without importing it."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def has_folders(package: str, *names: str) -> bool:
    """Whether ``package`` has all these packages inside, without importing it: asking for one of them would."""
    spec = importlib.util.find_spec(package)
    places = [] if spec is None else spec.submodule_search_locations or []
    return any(all((Path(place) / name).is_dir() for name in names) for place in places)


def packages(wanted: Mapping[str, str]) -> dict[str, str | None]:
    """Version of each package that is ``wanted``, module to distribution; None: not there. Nothing is imported."""
    return {
        module: (version(package) or "of unknown version") if has_module(module) else None
        for module, package in wanted.items()
    }


def has_gpu_driver() -> bool:
    """Whether this machine has the driver of a GPU that torch can use; torch is not imported."""
    return any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd"))


def gpus() -> list[str]:
    """Names of the GPUs that torch sees. Imports torch."""
    import torch

    if not torch.cuda.is_available():
        return []
    return [str(torch.cuda.get_device_name(index)) for index in range(torch.cuda.device_count())]


def cuda_versions() -> dict[str, str | None]:
    """CUDA and NCCL that torch was built with. Imports torch."""
    import torch

    usable = torch.version.cuda is not None and torch.cuda.is_available()
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if usable else None  # type: ignore[no-untyped-call]
    return {"cuda": torch.version.cuda, "nccl": nccl}


def git_commit(folder: Path) -> str | None:
    """The commit that ``folder`` is at; None outside a repository or without git."""
    try:
        found = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def run_environment(
    folder: Path, launcher: str, world_size: int, named: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Content of a run's env.json: a fixed list of facts. ``folder``: the recipe's, for the commit; ``named``: packages
    that its plugins name, module to distribution. Imports torch.
    """
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)),
        "packages": {name: version(name) for name in (*PACKAGES, *sorted((named or {}).values()))},
        **cuda_versions(),
        "gpus": gpus(),
        "launcher": launcher,
        "world_size": world_size,
        "git_commit": git_commit(folder),
    }
