"""First values: of stage 3 one parameter at a time, so that the whole model never exists on a rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from camshaft.models.init import fill, materialize, place, values
from camshaft.models.roles import Initial, Owned, initial_values, owned_parameters
from camshaft_deepspeed.layout import first_parts

if TYPE_CHECKING:
    from torch.nn import Module

    from camshaft.state import World
    from camshaft_deepspeed.config import Config
    from camshaft_deepspeed.layout import Flat


def first_values(model: Module, world: World, config: Config, stage: int) -> dict[str, Initial]:
    """Give parameters their values, and ``world.parts`` as the optimizer is built over them; return the distributions.

    Stage 0 leaves the parts, and masters, to the core.
    """
    initial = {owned.name: initial_values(owned) for owned in owned_parameters(model)}
    if stage == 3:
        scatter(model, world, config)
        world.readable = False
    else:
        dtype = world.policy.param if stage else world.policy.master
        materialize(model, seed=world.recipe.seed, device=world.device, dtype=dtype)
    if stage:
        world.parts = first_parts(model, world.roles)
    return initial


@torch.no_grad()
def scatter(model: Module, world: World, config: Config) -> None:
    """Make each parameter in the policy's dtype and divide it over the ranks before the next is made.

    Peak memory: this rank's shards and the largest parameter. Buffers are made last, whole.
    """
    convert: Any = None
    for owned in owned_parameters(model):
        _make(owned, world)
        if convert is None:
            convert = _first(owned.parameter, config)
        else:
            convert([owned.parameter])
    materialize(model, seed=world.recipe.seed, device=world.device, dtype=world.policy.param, only=())


def _make(owned: Owned, world: World) -> None:
    """Whole values in the same Parameter object."""
    data = torch.empty(owned.parameter.shape, dtype=world.policy.param, device=world.device)
    fill(data, owned.name, initial_values(owned), seed=world.recipe.seed)
    place(owned.parameter, data, owned.name)


def _first(parameter: nn.Parameter, config: Config) -> Any:
    """Divide the first parameter, which then knows how to divide others."""
    from deepspeed.runtime.zero.partition_parameters import Init

    holder = nn.Module()
    holder.register_parameter("one", parameter)
    Init(module=holder, config_dict_or_path=config)
    return parameter.convert_to_zero_parameters  # type: ignore[attr-defined]


@torch.no_grad()
def exact_masters(flats: Sequence[Flat], initial: Mapping[str, Initial], seed: int) -> None:
    """Write first values into master weights, which DeepSpeed has made of rounded parameters."""
    for flat in flats:
        for piece in flat.pieces:
            stop = piece.start + piece.length
            drawn = values(piece.name, initial[piece.name], seed=seed, start=piece.start, stop=stop)
            flat.tensor.data[piece.place : piece.place + piece.length].copy_(drawn)
