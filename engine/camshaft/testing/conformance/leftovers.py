"""What a closed run has left behind: hooks on modules and tensors, forwards of instances, threads.

torch has no public way to list hooks; the names of the dictionaries that it keeps them in are in this file alone, and
``tests/conformance/test_leftovers.py`` sees to it that each of them still catches its hook.
"""

from __future__ import annotations

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
)  # fmt: skip

OF_LIBRARIES = frozenset({"tqdm_monitor"})
"""Threads that a library keeps for the life of the process, whoever used it first."""


def left(model: Module, tensors: Iterable[Tensor] = (), optimizer: Optimizer | None = None) -> list[str]:
    """One line for everything that is still installed on the model, on ``tensors`` and in torch itself."""
    found: list[str] = []
    for name, module in model.named_modules():
        found += _hooks(module, MODULE, f"module '{name}'")
        if "forward" in vars(module):
            found.append(f"module '{name}' has a forward of its own")
    for label, tensor in [*_named(model), *((f"part {index}", each) for index, each in enumerate(tensors))]:
        found += _hooks(tensor, TENSOR, label)
    if optimizer is not None:
        found += _hooks(optimizer, OPTIMIZER, "the optimizer")
    return found + _hooks(torch.nn.modules.module, GLOBAL, "every module")


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
