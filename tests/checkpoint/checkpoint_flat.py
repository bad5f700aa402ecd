"""The toy of ``checkpoint_toy`` with its parameters in flat buffers, divided over ranks at odd places.

Parameters of one dtype and role lie one after another with gaps, cut anywhere: in the middle of rows, unevenly, so that
a rank holds several boxes of a parameter, or none. The model's own parameters hold NaN: whoever reads them loses.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from checkpoint_toy import Run, gradient, optimizer_of
from torch import nn
from torch.nn import Parameter

from camshaft.parts import Part, Parts, Piece
from camshaft.testing.record import optimizer_state, weights

GAP = 3
ELSEWHERE: Any = SimpleNamespace()
"""Stands for the channel to the ranks that hold the other pieces; nothing in these tests talks over it."""


def cuts(size: int, shards: int) -> list[int]:
    """Where each shard begins, and the end: the first is the smallest."""
    return [round(size * (number / shards) ** 1.7) for number in range(shards + 1)]


def flat_parts(
    named: Sequence[tuple[str, Parameter, str]], shard: int, shards: int, master: torch.dtype | None
) -> list[Part]:
    """This shard's parts of the named (name, parameter, role), with the parameters' values."""
    groups: dict[tuple[torch.dtype, str], list[tuple[str, Parameter]]] = {}
    for name, parameter, role in named:
        if parameter.numel():
            groups.setdefault((master or parameter.dtype, role), []).append((name, parameter))
    return [_part(members, dtype, role, shard, shards) for (dtype, role), members in groups.items()]


def _part(members: list[tuple[str, Parameter]], dtype: torch.dtype, role: str, shard: int, shards: int) -> Part:
    edges = cuts(sum(parameter.numel() + GAP for _, parameter in members), shards)
    begin, end = edges[shard : shard + 2]
    tensor, pieces, place = torch.zeros(end - begin, dtype=dtype), [], 0
    for name, parameter in members:
        first, last = max(begin, place), min(end, place + parameter.numel())
        if first < last:
            piece = Piece(name, tuple(parameter.shape), first - place, first - begin, last - first)
            values = parameter.detach().reshape(-1)[piece.start : piece.start + piece.length]
            tensor[piece.place : piece.place + piece.length] = values
            pieces.append(piece)
        place += parameter.numel() + GAP
    return Part(Parameter(tensor), role, tuple(pieces))


class FlatRun(Run):
    """One rank of a toy run whose parameters are divided over ``shards`` ranks, and copied over the others."""

    def __init__(
        self,
        path: Path,
        rank: int = 0,
        world_size: int = 1,
        *,
        shards: int | None = None,
        model: nn.Module | None = None,
        kind: str = "adamw",
        master: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(path, rank, world_size, model=model, kind=kind, **options)
        shards = shards or world_size
        world = self.state.world
        named = [(name, value, world.roles[name]) for name, value in self.model.named_parameters()]
        world.parts, world.stored = (
            Parts(
                flat_parts([each for each in named if each[1].requires_grad is trains], rank % shards, shards, master),
                ELSEWHERE,
            )
            for trains in (True, False)
        )
        world.readable = False
        self.state.optimizer = flat_optimizer(world.parts, kind)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(float("nan"))

    def step(self) -> None:
        """One optimizer step of the elements that this rank holds."""
        state, idle, whole = self.state, self.idle, weights(self.state.world, self.model)
        state.world.parts.isolate(idle, state.optimizer)
        for part in state.world.parts:
            used = not part.pieces or any(piece.name not in idle for piece in part.pieces)
            part.tensor.grad = torch.zeros_like(part.tensor) if used else None
            if used and part.tensor.grad is not None:
                for piece, flat in part.slices(part.tensor.grad):
                    full = gradient(piece.name, whole[piece.name], state.step).reshape(-1)
                    flat.copy_(full[piece.start : piece.start + piece.length])
        state.optimizer.step()
        self.count()


def flat_optimizer(parts: Parts, kind: str) -> torch.optim.Optimizer:
    decay = [part.tensor for part in parts if part.role in ("matrix", "embedding")]
    rest = [part.tensor for part in parts if part.role not in ("matrix", "embedding")]
    groups: list[dict[str, Any]] = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return optimizer_of(kind, groups)


def everything_whole(run: Run) -> dict[str, Any]:
    """As ``checkpoint_toy.everything`` of any run; state of parameters without elements left out."""
    state = run.state
    found: dict[str, Any] = {
        "step": state.step, "samples": state.consumed_samples, "tokens": state.consumed_tokens,
    }  # fmt: skip
    found |= {name: value.clone() for name, value in state.model.named_buffers() if name != "table"}
    found |= weights(state.world, state.model)
    found |= optimizer_state(state.world, state.optimizer)
    return {name: value for name, value in found.items() if not name.startswith("empty/")}
