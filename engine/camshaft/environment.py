"""Who started this process, as what rank: torchrun, deepspeed and Slurm read through one adapter. Without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from camshaft.errors import MachineError

Launcher = Literal["deepspeed", "torchrun", "slurm", "none"]

_TORCHRUN = ("TORCHELASTIC_RUN_ID", "GROUP_WORLD_SIZE", "GROUP_RANK")
_DEEPSPEED = ("CROSS_SIZE", "CROSS_RANK", "LOCAL_SIZE")
_COMMON = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


@dataclass(frozen=True, slots=True)
class Environment:
    """This process's place among the ranks. Launcher ``none`` means one process that nobody launched."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    launcher: Launcher = "none"
    nodes: int = 1
    master: tuple[str, int] | None = None
    """Address and port of the rendezvous; None where the launcher's own variables say it."""


def read_environment(environ: Mapping[str, str]) -> Environment:
    """Read the launcher's variables and check them against each other.

    Raises:
        MachineError: they are incomplete or contradict each other; names all of it, and what to do.
    """
    torchrun, deepspeed = _present(environ, _TORCHRUN), _present(environ, _DEEPSPEED)
    if torchrun and deepspeed:
        raise MachineError(
            f"variables of two launchers are set: {', '.join(torchrun)} (torchrun) and {', '.join(deepspeed)} "
            "(deepspeed). Start with one of them, from a shell in which the other's variables are unset"
        )
    if torchrun:
        found = _of_variables(environ, "torchrun", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE")
    elif deepspeed:
        found = _of_variables(environ, "deepspeed", "LOCAL_SIZE", "CROSS_SIZE")
    elif _slurm_task(environ):
        found = _of_slurm(environ)
    elif _present(environ, _COMMON):
        found = _of_variables(environ, "torchrun", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE")
    else:
        return Environment()
    _check_ranges(found)
    _check_slurm(environ, found)
    return found


def _present(environ: Mapping[str, str], names: tuple[str, ...]) -> list[str]:
    return [name for name in names if environ.get(name, "") != ""]


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise MachineError(f"{name} is {text!r} in the environment, and must be a whole number")
    return int(text)


def _of_variables(environ: Mapping[str, str], launcher: Launcher, local_size: str, nodes_name: str) -> Environment:
    needed = (*_COMMON, local_size)
    present = _present(environ, needed)
    missing = [name for name in needed if name not in present]
    if missing == [local_size] and environ.get("WORLD_SIZE") == "1":
        missing = []
    if missing:
        raise MachineError(
            f"{', '.join(missing)} missing in the environment, while {', '.join(present) or nodes_name} is set. "
            "Start every rank with deepspeed, torchrun or srun, or unset these variables to run one process"
        )
    world_size = _number(environ, "WORLD_SIZE")
    local_world_size = _number(environ, local_size) if local_size in present else 1
    default = -(-world_size // max(local_world_size, 1))
    nodes = _number(environ, nodes_name) if environ.get(nodes_name) else default
    return Environment(
        rank=_number(environ, "RANK"),
        local_rank=_number(environ, "LOCAL_RANK"),
        world_size=world_size,
        local_world_size=local_world_size,
        launcher=launcher,
        nodes=nodes if local_world_size < world_size else 1,
    )


def _slurm_task(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process. A batch script sees most of the same variables as rank 0 does."""
    if not _present(environ, ("SLURM_PROCID",)) or not _present(environ, ("SLURM_NTASKS",)):
        return False
    step = environ.get("SLURM_STEP_ID", "")
    if step.isdigit():
        return int(step) < 2**32 - 16  # the numbers above stand for batch, interactive and extern steps
    task = environ["SLURM_PROCID"] != "0" or "SLURM_LAUNCH_NODE_IPADDR" in environ
    return task or "SLURM_JOB_ID" not in environ


def _of_slurm(environ: Mapping[str, str]) -> Environment:
    missing = [name for name in ("SLURM_LOCALID",) if not environ.get(name)]
    if missing:
        raise MachineError(f"{missing[0]} missing in the environment of a Slurm task. Start the ranks with srun")
    rank, world_size = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_NTASKS")
    nodes = next((_number(environ, n) for n in ("SLURM_STEP_NUM_NODES", "SLURM_NNODES") if environ.get(n)), 1)
    for own, theirs in (("RANK", rank), ("WORLD_SIZE", world_size), ("LOCAL_RANK", _number(environ, "SLURM_LOCALID"))):
        if environ.get(own) and _number(environ, own) != theirs:
            slurm = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}[own]
            raise MachineError(f"{own}={environ[own]} contradicts {slurm}={theirs}. Unset {own}, or do not use srun")
    return Environment(
        rank=rank,
        local_rank=_number(environ, "SLURM_LOCALID"),
        world_size=world_size,
        local_world_size=_slurm_tasks_here(environ, world_size, nodes),
        launcher="slurm",
        nodes=nodes,
        master=_slurm_master(environ) if nodes > 1 else None,
    )


def _slurm_tasks_here(environ: Mapping[str, str], world_size: int, nodes: int) -> int:
    """Tasks on this node, from lists such as ``4(x2),3``."""
    if nodes == 1:
        return world_size
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        counts: list[int] = []
        for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get(name, "")):
            counts += [int(count)] * int(times or 1)
        node = environ.get("SLURM_NODEID", "")
        if sum(counts) == world_size and node.isdigit() and int(node) < len(counts):
            return counts[int(node)]
    if world_size % nodes:
        raise MachineError(
            f"SLURM_NTASKS={world_size} on SLURM_NNODES={nodes}, and neither SLURM_STEP_TASKS_PER_NODE nor "
            "SLURM_NODEID says how many tasks are on this node. Start the ranks with srun --ntasks-per-node"
        )
    return world_size // nodes


def _slurm_master(environ: Mapping[str, str]) -> tuple[str, int]:
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    hosts = next((environ[name] for name in names if environ.get(name)), "")
    address = environ.get("MASTER_ADDR") or first_host(hosts) or environ.get("SLURM_LAUNCH_NODE_IPADDR", "")
    if not address:
        raise MachineError("no SLURM_NODELIST and no MASTER_ADDR: the ranks cannot find each other. Use srun")
    if environ.get("MASTER_PORT"):
        return address, _number(environ, "MASTER_PORT")
    job, step = environ.get("SLURM_JOB_ID", "0"), environ.get("SLURM_STEP_ID", "0")
    return address, 20_000 + (int(job) * 31 + int(step)) % 12_000  # below the ports that systems hand out by themselves


def first_host(hosts: str) -> str:
    """First name of a Slurm host list: ``gpu[003-007,9],login`` gives ``gpu003``."""
    found = re.match(r"([^,\[]*)(?:\[(\d+)[^\]]*\])?([^,\[]*)", hosts)
    return "".join(part or "" for part in found.groups()) if found else ""


def _check_ranges(found: Environment) -> None:
    names = {"slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")}.get(
        found.launcher, ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    )
    faults = []
    if found.world_size < 1:
        faults.append(f"{names[1]}={found.world_size} is not a number of processes")
    elif found.rank >= found.world_size:
        faults.append(f"{names[0]}={found.rank} is not below {names[1]}={found.world_size}")
    if found.local_rank >= found.local_world_size:
        faults.append(f"{names[2]}={found.local_rank} is not below the {found.local_world_size} rank(s) of this node")
    if found.local_world_size > found.world_size:
        faults.append(f"{found.local_world_size} ranks on this node, but {names[1]}={found.world_size} in all")
    if found.local_rank > found.rank:
        faults.append(f"{names[2]}={found.local_rank} is above {names[0]}={found.rank}")
    if faults:
        raise MachineError("; ".join(faults) + ". These variables come from the launcher: is one set by hand?")


def _check_slurm(environ: Mapping[str, str], found: Environment) -> None:
    """A launcher inside a Slurm job: one agent a node, or all of its tasks."""
    if found.launcher in ("slurm", "none") or not _present(environ, ("SLURM_NTASKS",)):
        return
    tasks, where = _number(environ, "SLURM_NTASKS"), "SLURM_NTASKS"
    allowed = {1, found.nodes, found.world_size}
    if environ.get("SLURM_STEP_NUM_TASKS") and _slurm_task(environ):
        tasks, where = _number(environ, "SLURM_STEP_NUM_TASKS"), "SLURM_STEP_NUM_TASKS"
        allowed = {found.nodes}
    if tasks not in allowed:
        raise MachineError(
            f"WORLD_SIZE={found.world_size} on {found.nodes} node(s) contradicts {where}={tasks}. "
            f"Start {found.launcher} once a node (srun --ntasks-per-node=1), or start the ranks with srun alone"
        )
