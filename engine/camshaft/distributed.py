"""Ranks finding each other: the rendezvous, process groups, threads and device of a rank, and the side channel."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, cast

from camshaft.environment import Environment, Launcher, read_environment
from camshaft.errors import MachineError
from camshaft.processes import identify, launcher_of

if TYPE_CHECKING:
    import torch
    from torch._C._distributed_c10d import Store

    from camshaft.recipe.schema import Launch

__all__ = [
    "JOB_VARIABLE",
    "Control",
    "Environment",
    "Launcher",
    "check_agreement",
    "connect",
    "disconnect",
    "forget_meeting",
    "pick_device",
    "read_environment",
    "set_threads",
    "share_text",
    "side_store",
    "threads_per_rank",
]

JOB_VARIABLE = "CAMSHAFT_JOB"
"""Names the private folder of a job that ``camshaft train`` started itself."""

MAX_TIMEOUT_S = 600

_met_in: list[Path] = []
"""The folder that ``connect`` made, to be removed at the end; that of ``camshaft train`` is its own to remove."""


def connect(environment: Environment, device_type: str, timeout_s: int) -> None:
    """Make the default process group: nccl for cuda tensors, gloo for CPU tensors. Does nothing when there is one.

    On one node the ranks meet in a file of a private folder and talk over the loopback interface alone, so that
    nothing listens beyond this machine. Several nodes meet at the launcher's address.

    Raises:
        MachineError: the other ranks did not come within ``timeout_s`` seconds (at most 600).
    """
    import torch.distributed as dist

    if environment.world_size == 1 or dist.is_initialized():
        return
    timeout = timedelta(seconds=min(timeout_s, MAX_TIMEOUT_S))
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    method = None if environment.nodes == 1 else "env://"
    if environment.master is not None:
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = (str(part) for part in environment.master)
    try:
        dist.init_process_group(
            backend,
            init_method=method,
            timeout=timeout,
            world_size=environment.world_size,
            rank=environment.rank,
            store=_one_node_store(environment, timeout) if method is None else None,
        )
    except RuntimeError as error:
        text = str(error).splitlines()[0]
        late = "timeout" in text.lower() or "timed out" in text.lower()
        raise MachineError(
            f"rank {environment.rank} of {environment.world_size} could not meet the other ranks"
            f"{f' within {timeout.seconds} s' if late else ''}: {text}. Did a rank fail to start? See its log"
        ) from error


def _one_node_store(environment: Environment, timeout: timedelta) -> Store:
    from torch.distributed import FileStore  # type: ignore[attr-defined]  # public, but not marked as re-exported

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ["NCCL_SOCKET_IFNAME"] = "=lo"
    folder = rendezvous_folder(os.environ)
    if JOB_VARIABLE not in os.environ:
        _met_in.append(folder)
    store = FileStore(str(folder / "store"), environment.world_size)
    store.set_timeout(timeout)
    return cast("Store", store)


def side_store(name: str) -> Store:
    """A connection of its own to the store that the ranks met in, for keys under ``name``.

    Threads may use it while the main thread waits in a collective. The default group must exist.
    """
    from torch.distributed import PrefixStore, distributed_c10d  # type: ignore[attr-defined]  # public, not re-exported

    # torch has no public way to the store of a group before 2.13.
    clone = distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]  # the stubs leave it out
    return cast("Store", PrefixStore(name, clone))


def rendezvous_folder(environ: Mapping[str, str]) -> Path:
    """A folder that all ranks of this job on this node name alike and no other job does, open to this user alone.

    Named after the launcher's process (pid and start time) unless ``camshaft train`` made one.

    Raises:
        MachineError: the folder is somebody else's.
    """
    given = environ.get(JOB_VARIABLE)
    if given:
        return _private(Path(given))
    agent = launcher_of(os.getpid())
    process = agent[1] if agent else identify(os.getppid())
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    attempt = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    step = f"{environ.get('SLURM_JOB_ID', '')}.{environ.get('SLURM_STEP_ID', '')}"
    name = hashlib.sha256(f"{boot} {process} {attempt} {step}".encode()).hexdigest()[:24]
    return _private(Path(tempfile.gettempdir()) / f"camshaft-{os.getuid()}-{name}")


def _private(folder: Path) -> Path:
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise MachineError(
            f"{folder} is not a private folder of this user, so the ranks do not meet in it. Remove it, or set TMPDIR"
        )
    return folder


def disconnect(failed: bool = False) -> None:
    """Leave the process group. After a failure nothing is waited for: peers may be gone, and nccl would hang."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        return
    nccl = "nccl" in str(dist.get_backend())
    if not failed:
        with contextlib.suppress(RuntimeError):  # all leave together: the first exit makes launchers end the others
            dist.all_reduce(torch.zeros(1))
    if not (failed and nccl):
        dist.destroy_process_group()
    forget_meeting()


def forget_meeting() -> None:
    """Remove the folder that ``connect`` made. Groups that exist do not need it, and no new rank can join."""
    while _met_in:
        shutil.rmtree(_met_in.pop(), ignore_errors=True)


def pick_device(launch: Launch, environment: Environment) -> torch.device:
    """The device of this rank, made current: the CPU, or the GPU with the rank's number on this node.

    Raises:
        MachineError: no GPU where one is asked for, or fewer than ranks.
    """
    import torch

    kind = launch.device if launch.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 0:
        raise MachineError("launch.device is cuda, and torch sees no GPU. `camshaft doctor` shows why")
    index = environment.local_rank
    if environment.launcher == "slurm" and count == 1:
        index = 0  # srun --gpus-per-task shows each task its own GPU as number 0
    if index >= count:
        raise MachineError(
            f"rank {environment.rank} is number {index} on its node, which has {count} GPU(s). Start fewer ranks"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def threads_per_rank(environment: Environment, setting: int | str) -> int:
    """Threads of one rank: the recipe's number, or cores / ranks of the node. The launcher's own choice is ignored.

    Where the launcher bound each rank to cores of its own, ``auto`` is their number.
    """
    if isinstance(setting, int):
        return setting
    own = os.sched_getaffinity(0)
    agent = launcher_of(os.getpid())
    if agent is not None:
        with contextlib.suppress(OSError):
            if own < os.sched_getaffinity(agent[1].pid):
                return len(own)
    return max(1, len(own) // environment.local_world_size)


def set_threads(environment: Environment, setting: int | str) -> int:
    """Set the threads of this rank, before and after torch is imported; returns their number."""
    count = threads_per_rank(environment, setting)
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(count)
    # Threads that wait for one another by spinning hold the cores that the others need: beside one other busy
    # process, a small model on two cores ran at half its speed.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import torch

    torch.set_num_threads(count)
    return count


def share_text(environment: Environment, text: str | None) -> str:
    """Give rank 0's ``text`` to every rank. The default group must exist if there is more than one process."""
    if environment.world_size == 1:
        return text or ""
    import torch
    import torch.distributed as dist

    content = torch.frombuffer(bytearray((text or "").encode() or b"\0"), dtype=torch.uint8).clone()
    size = torch.tensor([content.numel()])
    dist.broadcast(size, 0)
    if environment.rank:
        content = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(content, 0)
    return bytes(content.tolist()).decode().rstrip("\0")


SAME_RUN = (
    "another recipe, or other versions of torch, Camshaft or a plugin, than rank 0. "
    "Give every node the same files and packages"
)


def check_agreement(environment: Environment, digest: str, otherwise: str = SAME_RUN) -> None:
    """Compare what every rank is about to run, before the first collective of the training.

    ``otherwise`` ends the error's sentence "rank(s) 1, 3 have ...", and says what to do.

    Raises:
        MachineError: on all ranks alike, naming the ranks whose ``digest`` is not rank 0's.
    """
    if environment.world_size == 1:
        return
    import torch
    import torch.distributed as dist

    own = torch.tensor(list(hashlib.sha256(digest.encode()).digest()), dtype=torch.uint8)
    found = [torch.empty_like(own) for _ in range(environment.world_size)]
    dist.all_gather(found, own)
    others = [rank for rank, value in enumerate(found) if not torch.equal(value, found[0])]
    if others:
        names = ", ".join(str(rank) for rank in others[:8]) + (", ..." if len(others) > 8 else "")
        raise MachineError(f"rank(s) {names} have {otherwise}")


class Control:
    """A side channel over all ranks on the CPU: sums of a few integers that run beside the training.

    Own gloo group, so that it never waits behind gradients. All ranks must construct it at the same point.
    """

    def __init__(self, environment: Environment, timeout_s: int = MAX_TIMEOUT_S) -> None:
        self._group: torch.distributed.ProcessGroup | None = None
        self._work: torch.distributed.Work | None = None
        self._values: torch.Tensor | None = None
        self._own: list[int] | None = None
        if environment.world_size > 1:
            import torch.distributed as dist

            timeout = timedelta(seconds=min(timeout_s, MAX_TIMEOUT_S))
            self._group = dist.new_group(backend="gloo", timeout=timeout)

    def start(self, values: Sequence[int]) -> None:
        """Start the sum of each of ``values`` (int64) over all ranks. One at a time.

        Raises:
            RuntimeError: the sum before this one was not finished.
        """
        if self._own is not None:
            raise RuntimeError("Control.start was called twice without finish")
        self._own = list(values)
        if self._group is None:
            return
        import torch
        import torch.distributed as dist

        self._values = torch.tensor(self._own, dtype=torch.int64)
        self._work = dist.all_reduce(self._values, group=self._group, async_op=True)

    def finish(self) -> list[int]:
        """Wait for the sums and return them.

        Raises:
            RuntimeError: a peer is gone, or did not answer in time.
        """
        own, self._own = self._own or [], None
        if self._work is None or self._values is None:
            return own
        self._work.wait()
        self._work = None
        return [int(value) for value in self._values.tolist()]

    def close(self) -> None:
        """Forget the group; it ends with the default group."""
        self._group, self._work = None, None
