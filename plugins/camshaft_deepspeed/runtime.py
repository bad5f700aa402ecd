"""What DeepSpeed keeps per process: set up for one run, and put back at its end."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from camshaft.errors import MachineError, RecipeError
from camshaft_deepspeed.options import fp16_problem, fp64_problem

if TYPE_CHECKING:
    from camshaft.state import Policy, World
    from camshaft_deepspeed.options import Options

KERNEL = "deepspeed_shm_comm"
"""A C++ extension for collectives between processes of one machine, which DeepSpeed would compile on each start."""
LATE = ("deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.runtime.zero.stage3")
"""Imported by DeepSpeed when an engine is made; the first loads torch's compiler."""
GLOBALS = ("_WORLD_GROUP", "mpu", "mesh_device", "_ZERO_PARAM_INTRA_PARALLEL_GROUP", "_DATA_PARALLEL_GROUP")


class Runtime:
    """DeepSpeed's module-level state and the environment that it reads, for one run in this process."""

    def __init__(self, world: World) -> None:
        self._undo = contextlib.ExitStack()
        try:
            self._group(world)
            self._environment(world)
            self._silence()
            self._modules(world)
        except BaseException:
            self._undo.close()
            raise

    def close(self) -> None:
        """Put everything back; may be called again."""
        self._undo.close()

    def _group(self, world: World) -> None:
        """DeepSpeed wants a process group with one process too."""
        if dist.is_initialized():
            return
        backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
        store = dist.HashStore()  # type: ignore[attr-defined]  # public, but not marked as re-exported
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        self._undo.callback(dist.destroy_process_group)

    def _environment(self, world: World) -> None:
        wanted = {"DS_ACCELERATOR": world.device.type, "LOCAL_RANK": str(world.device.index or 0)}
        before = {name: os.environ.get(name) for name in wanted}
        os.environ.update(wanted)
        for name, value in before.items():
            self._undo.callback(_restore, os.environ, name, value)

    def _silence(self) -> None:
        """DeepSpeed's progress, and torch's advice on collectives that DeepSpeed calls by their old names."""
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        before = list(warnings.filters)
        warnings.filterwarnings("ignore", r".*torch\.distributed\.\w+. is deprecated", FutureWarning)
        added = [entry for entry in warnings.filters if entry not in before]
        self._undo.callback(_forget_filters, added)

    def _modules(self, world: World) -> None:
        load()
        from deepspeed.accelerator import get_accelerator
        from deepspeed.comm import comm
        from deepspeed.utils import groups

        import deepspeed

        if get_accelerator().device_name() != world.device.type:
            raise MachineError(
                f"DeepSpeed was loaded for '{get_accelerator().device_name()}' in this process, and the run is on "
                f"'{world.device.type}': set DS_ACCELERATOR={world.device.type}"
            )
        self._switch_off(deepspeed.ops)
        for module, names in ((groups, GLOBALS), (comm, ("cdb",))):
            for name in names:
                self._undo.callback(setattr, module, name, getattr(module, name))
                setattr(module, name, None)
        # Else DeepSpeed clones the world, and the clone's collectives would wait for half an hour.
        groups._WORLD_GROUP = world.mesh.group("dp") or dist.group.WORLD
        deepspeed.init_distributed(dist_init_required=False)

    def _switch_off(self, operations: Any) -> None:
        """The extension counts as one that cannot be built; which others could be is not tried out for it."""
        name = "__compatible_ops__"
        before = vars(operations).get(name)
        setattr(operations, name, {**(before or {}), KERNEL: False})
        self._undo.callback(_restore, vars(operations), name, before)


def load() -> None:
    """Import what DeepSpeed needs, without the warnings of modules that are of no use here."""
    if "deepspeed" in sys.modules and all(name in sys.modules for name in LATE):
        return
    with warnings.catch_warnings(), _compilers_silenced():
        warnings.simplefilter("ignore")
        import deepspeed  # noqa: F401

        for name in LATE:
            with contextlib.suppress(ModuleNotFoundError):  # names change between DeepSpeed's versions
                importlib.import_module(name)


@contextlib.contextmanager
def _compilers_silenced() -> Iterator[None]:
    """DeepSpeed tries out which extensions a compiler could make; what does not link is no fault."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def _restore(target: Any, name: str, value: Any) -> None:
    if value is None:
        target.pop(name, None)
    else:
        target[name] = value


def _forget_filters(added: list[Any]) -> None:
    for entry in added:
        with contextlib.suppress(ValueError):
            warnings.filters.remove(entry)  # type: ignore[attr-defined]  # a list, typed as a sequence


def check_dtypes(options: Options, policy: Policy, key: str) -> None:
    """Dtypes of whatever plugin owns ``precision``.

    Raises:
        RecipeError: one that DeepSpeed does not have.
    """
    if torch.float64 in (policy.master, policy.reduce):
        raise RecipeError(fp64_problem(key))
    if options.stage and policy.param == torch.float16:
        raise RecipeError(fp16_problem(options.stage, key))


def check_disk(options: Options, key: str) -> None:
    """The extension that reads and writes disks.

    Raises:
        MachineError: it is not there and cannot be built.
    """
    if "nvme" not in (options.offload_optimizer, options.offload_parameters):
        return
    from deepspeed.ops.op_builder import AsyncIOBuilder

    with _compilers_silenced():
        found = AsyncIOBuilder().is_compatible(verbose=False)
    if not found:
        raise MachineError(
            f"{key} offloads to nvme, for which DeepSpeed builds an extension over libaio, and cannot here: "
            "install libaio-dev (Debian, Ubuntu) or libaio-devel (Fedora), a C++ compiler and ninja, or offload to cpu"
        )
