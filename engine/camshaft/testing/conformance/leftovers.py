"""What a closed run has left behind: hooks on modules and tensors, forwards and classes of instances, hooks and modes
of the whole process, threads and processes.

torch has no public way to list hooks; the names of the dictionaries that it keeps them in are in this file alone, and
``tests/conformance/test_leftovers.py`` sees to it that each of them still catches its hook.
"""

from __future__ import annotations

import multiprocessing
import sys
import threading
from collections.abc import Collection, Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

MODULE = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
TENSOR = ("_backward_hooks", "_post_accumulate_grad_hooks")
OPTIMIZER = (
    "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks", "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks", "_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks",
)  # fmt: skip
GLOBAL = (
    "_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks",
    "_global_buffer_registration_hooks", "_global_module_registration_hooks", "_global_parameter_registration_hooks",
)  # fmt: skip
OPTIMIZERS = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")

OF_LIBRARIES = frozenset({"tqdm_monitor"})
"""Threads that a library keeps for the life of the process, whoever used it first."""


def left(model: Module, tensors: Iterable[Tensor] = (), optimizer: Optimizer | None = None) -> list[str]:
    """One line for everything that is still installed on the model, on ``tensors`` and on the optimizer."""
    found: list[str] = []
    for name, module in model.named_modules():
        found += _hooks(module, MODULE, f"module '{name}'")
        if "forward" in vars(module):
            found.append(f"module '{name}' has a forward of its own")
    for label, tensor in [*_named(model), *((f"part {index}", each) for index, each in enumerate(tensors))]:
        found += _hooks(tensor, TENSOR, label)
    if optimizer is not None:
        found += _hooks(optimizer, OPTIMIZER, "the optimizer")
    return found


def changed(model: Module, fresh: Module) -> list[str]:
    """Modules of ``model`` that are of another class than in ``fresh``, the model before anybody changed it."""
    before = dict(fresh.named_modules())
    return [
        f"module '{name}' is a {type(module).__name__}, and was a {type(before[name]).__name__}"
        for name, module in model.named_modules()
        if name in before and type(module) is not type(before[name])
    ]


def everywhere() -> set[str]:
    """Lines for what holds in the whole process: hooks on every module and optimizer, torch's modes, processes."""
    found = _hooks(torch.nn.modules.module, GLOBAL, "every module")
    found += _hooks(sys.modules[Optimizer.__module__], OPTIMIZERS, "every optimizer")
    found += [f"process '{each.name}'" for each in multiprocessing.active_children()]
    modes = {
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "autocast on the CPU": torch.is_autocast_enabled("cpu"),
        "detection of anomalies": torch.is_anomaly_enabled(),
    }
    return {*found, *(f"{name}: {value}" for name, value in modes.items())}


def threads_beside(before: Collection[threading.Thread]) -> list[str]:
    """Names of Python threads that run now and did not before."""
    return [f"thread '{each.name}'" for each in _running() if each not in before]


def _running() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name not in OF_LIBRARIES]


def _named(model: Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        yield f"parameter '{name}'", parameter


def _hooks(owner: object, attributes: Iterable[str], label: str) -> list[str]:
    return [f"{attribute.strip('_')} on {label}" for attribute in attributes if getattr(owner, attribute, None)]
