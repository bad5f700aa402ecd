"""Command lines of the launchers, and what their environment needs so that they behave on one machine."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from camshaft.environment import Launcher
from camshaft.errors import MachineError

_DEEPSPEED_HOSTFILE = Path("/job/hostfile")  # read by deepspeed unasked; it would start ranks on other machines
_SLURM_TASK = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS")


@dataclass(frozen=True, slots=True)
class Target:
    """What every rank runs: ``python -m module arguments``."""

    module: str
    arguments: tuple[str, ...]


def find_tool(name: str) -> list[str] | None:
    """The launcher's command: beside this interpreter, else on PATH; None if there is none."""
    beside = Path(sys.executable).parent / name
    if os.access(beside, os.X_OK):
        return [str(beside)]
    found = shutil.which(name)
    return [found] if found else None


def free_port() -> int:
    """A TCP port of the loopback interface that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def equivalent(launcher: Launcher, processes: int, target: Target) -> str:
    """The line that a user would type for the same run."""
    head = {
        "deepspeed": f"deepspeed --num_gpus {processes} --no_local_rank --module",
        "torchrun": f"torchrun --nproc-per-node {processes} -m",
        "slurm": f"srun --ntasks {processes} python -m",
        "none": "python -m",
    }[launcher]
    return f"{head} {shlex.join((target.module, *target.arguments))}"


def command_line(
    launcher: str, processes: int, target: Target, *, job: Path, port: int, environ: Mapping[str, str]
) -> list[str]:
    """The command that starts the ranks.

    torchrun meets in a file of the job's private folder: its own store would listen on every interface.

    Raises:
        MachineError: the launcher is not installed, or cannot express ``CUDA_VISIBLE_DEVICES``.
    """
    tool = find_tool(launcher)
    if tool is None:
        raise MachineError(
            f"the launcher '{launcher}' is neither beside {sys.executable} nor on PATH. Install "
            f"{'deepspeed' if launcher == 'deepspeed' else 'torch'}, or set launch.launcher to the other one"
        )
    words = (target.module, *target.arguments)
    if launcher == "torchrun":
        meeting = f"--rdzv-backend=c10d --rdzv-conf=store_type=file --rdzv-endpoint={job / 'agents'}".split()
        logs = f"--log-dir={job / 'torchrun'}"  # its default is a folder in the temporary one that nobody removes
        return [*tool, f"--nproc-per-node={processes}", *meeting, f"--rdzv-id={job.name}", logs, "-m", *words]
    places = _deepspeed_places(processes, environ)
    if _DEEPSPEED_HOSTFILE.exists():
        places += ["--hostfile", "none"]
    return [*tool, *places, "--no_local_rank", "--master_port", str(port), "--module", *words]


def _deepspeed_places(processes: int, environ: Mapping[str, str]) -> list[str]:
    """deepspeed drops CUDA_VISIBLE_DEVICES when given a number; the GPUs are then named one by one."""
    visible = [part.strip() for part in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()]
    if not visible or environ.get("DS_ACCELERATOR") == "cpu":
        return ["--num_gpus", str(processes)]
    if not all(part.isdigit() for part in visible):
        raise MachineError(
            "deepspeed understands only numbers in CUDA_VISIBLE_DEVICES, and this one holds names of GPUs. "
            "Set launch.launcher=torchrun"
        )
    return ["--include", f"localhost:{','.join(visible[:processes])}"]


def child_environment(
    environ: Mapping[str, str], *, launcher: str, device: str, threads: int, extensions: Path
) -> dict[str, str]:
    """Environment of the launcher and its ranks."""
    found = {name: value for name, value in environ.items() if name not in _SLURM_TASK}  # this job is not their task
    found["OMP_NUM_THREADS"] = str(threads)
    found.setdefault("TORCH_EXTENSIONS_DIR", str(extensions))
    if launcher == "torchrun":
        found["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    if device == "cpu":
        found.setdefault("DS_ACCELERATOR", "cpu")
    return found


def extensions_folder(cache: Path) -> Path:
    """Where operators compiled on demand are kept: one folder an environment, since one of another does not load.

    Build locks that a killed process left behind are removed; torch would wait for them for ever.
    """
    folder = cache / "torch_extensions" / hashlib.sha256(sys.prefix.encode()).hexdigest()[:12]
    locks = list(folder.glob("**/lock")) if folder.exists() else []
    held = _open_files() if locks else set()
    for lock in locks:
        if str(lock.resolve()) not in held:
            lock.unlink(missing_ok=True)
    return folder


def _open_files() -> set[str]:
    """Paths of every file that a process of this user has open."""
    found: set[str] = set()
    for handles in Path("/proc").glob("[0-9]*/fd"):
        with contextlib.suppress(OSError):
            for handle in handles.iterdir():
                with contextlib.suppress(OSError):
                    found.add(str(handle.readlink()))
    return found


def target_of(recipe: str, overrides: Sequence[str], directory: Path, words: Sequence[str] = ("train",)) -> Target:
    """The ranks' own command line: the user's, in a run directory that is settled. ``words``: command and options."""
    others = [override for override in overrides if not override.startswith("run.dir=")]
    return Target("camshaft", (*words, recipe, *others, f"run.dir={directory}"))
