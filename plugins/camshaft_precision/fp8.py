"""Which linear layers of a model are computed in fp8, and the forwards that they get."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from camshaft.errors import Problem, RecipeError
from camshaft_precision import choice
from camshaft_precision.delayed import Ring
from camshaft_precision.linear import forward_of

if TYPE_CHECKING:
    from camshaft.state import World
    from camshaft_precision import Fp8

ADA = (8, 9)
"""Compute capability from which on NVIDIA's tensor cores have fp8."""


def check_device(device: torch.device, key: str) -> None:
    """Refuse a GPU without fp8.

    Raises:
        RecipeError: with what it is.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < ADA:
        major, minor = torch.cuda.get_device_capability(device)
        raise RecipeError(too_old(torch.cuda.get_device_name(device), f"{major}.{minor}", key))


def too_old(name: str, capability: str, key: str) -> Problem:
    """The fault of a GPU without fp8."""
    return Problem(
        f"fp8 needs a GPU of compute capability {ADA[0]}.{ADA[1]} or newer, and {name} has {capability}",
        key=f"{key}.compute",
        fix=f"set {key}.compute=bf16",
    )


class Layers:
    """The linear layers that are computed in fp8, with forwards of their own until ``close``."""

    def __init__(self, options: Fp8, world: World, model: nn.Module, name: str) -> None:
        self._key = f"plugins.{name}"
        chosen = choose(options, model, self._key)
        for each, module in chosen.items():
            self._check(each, module)
        self.names = list(chosen)
        self._modules = list(chosen.values())
        self.ring: Ring | None = None
        if options.scaling == "delayed":
            shape = world.mesh.shape
            same = shape.joined(*(axis.name for axis in shape.axes if axis.name != "pp"))
            channel = world.mesh.channel(name, same) if same else None
            self.ring = Ring(self.names, options.history, world.device, channel)
        for each, module in chosen.items():
            meter = None if self.ring is None else self.ring.meter(each)
            module.forward = forward_of(  # type: ignore[method-assign,assignment]
                module, rowwise=options.recipe == "rowwise", wide=options.weight_gradient == "bf16", meter=meter
            )

    def _check(self, name: str, module: nn.Linear) -> None:
        if "forward" in vars(module) or type(module).forward is not nn.Linear.forward:
            raise self._refusal(name, "is computed by a forward of its own (of its class, or of another plugin)")
        rows, columns = module.weight.shape
        if rows % choice.MULTIPLE or columns % choice.MULTIPLE:
            sizes = f"{columns} inputs and {rows} outputs"
            raise self._refusal(name, f"has {sizes} on this rank, and fp8 needs multiples of {choice.MULTIPLE}")

    def _refusal(self, name: str, reason: str) -> RecipeError:
        return RecipeError(choice.unusable(name, reason, self._key))

    def close(self) -> None:
        """Give the layers their own forwards back."""
        for module in self._modules:
            vars(module).pop("forward", None)
        self._modules = []


def choose(options: Fp8, model: nn.Module, key: str) -> dict[str, nn.Linear]:
    """Linear layers by name: all but those that ``keep`` matches; by default those of inner layers.

    Raises:
        RecipeError: a pattern that keeps nothing out, or nothing is left.
    """
    every = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    whole = not getattr(model, "spans", {})  # a stage of a pipeline may well have none of them
    if options.keep is None:
        layers, count = _layers(model, key)
        found, none_left = choice.inner(tuple(every), layers, count), count < 3
    else:
        idle = tuple(choice.idle(tuple(every), options.keep, key)) if whole else ()
        if idle:
            raise RecipeError(idle)
        found = choice.without(tuple(every), options.keep)
        none_left = whole and not found
    if none_left:
        raise RecipeError(choice.nothing_left(len(every), key))
    return {name: every[name] for name in found}


def _layers(model: Any, key: str) -> tuple[str, int]:
    """What holds the layers, and how many the whole model has."""
    pipeline = getattr(model, "pipeline", None)
    if pipeline is None:
        raise RecipeError(
            Problem(
                f"{type(model).__name__} does not tell what its layers are (attribute `pipeline`), so the first and "
                "the last one are unknown",
                key=f"{key}.fp8.keep",
                fix=f"name what to keep out of fp8 in {key}.fp8.keep",
            )
        )
    spans = getattr(model, "spans", {})
    count = next(iter(spans.values())).of if spans else len(model.get_submodule(pipeline.layers))
    return pipeline.layers, count
