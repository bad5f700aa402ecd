"""What each parameter is for, and the values that it starts from, told by the module that owns it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

Role = str
"""``matrix``, ``embedding``, ``norm`` or ``bias``."""

DEFAULT_STD = 0.02


class Initial(NamedTuple):
    """First values of a parameter: normal around 0 with deviation ``std``, or ``constant`` where ``std`` is 0."""

    std: float = 0.0
    constant: float = 0.0


class Owned(NamedTuple):
    """A parameter under its first name, with the module that it belongs to."""

    name: str
    module: nn.Module
    leaf: str
    parameter: nn.Parameter


def owned_parameters(model: nn.Module) -> Iterator[Owned]:
    """Every parameter once, tied ones under their first name, in the order of ``named_parameters``."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield Owned(f"{prefix}.{leaf}" if prefix else leaf, module, leaf, parameter)


def role(owned: Owned) -> Role:
    """Role by the type of the module; parameters of unknown modules are told by their name and dimensions."""
    if owned.leaf.endswith("bias"):
        return "bias"
    if isinstance(owned.module, nn.Embedding):
        return "embedding"
    if isinstance(owned.module, (nn.RMSNorm, nn.LayerNorm, nn.GroupNorm)) or owned.parameter.ndim < 2:
        return "norm"
    return "matrix"


def roles(model: nn.Module) -> dict[str, Role]:
    """First name of each parameter to its role."""
    return {owned.name: role(owned) for owned in owned_parameters(model)}


def initial_values(owned: Owned) -> Initial:
    """First values: norms 1, biases 0, the rest normal with the module's ``initializer_std`` (0.02 without one)."""
    match role(owned):
        case "norm":
            return Initial(constant=1.0)
        case "bias":
            return Initial()
    std = getattr(owned.module, "initializer_std", DEFAULT_STD)
    return Initial(std=float(std))
