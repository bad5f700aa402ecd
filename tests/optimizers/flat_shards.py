"""A storage plugin of the tests: flat parts of uneven ranges over dp, as simple as can be.

ddp reduces the gradients; this one only divides what the optimizer updates. Each role has one flat part a rank, with
padding at both ends and between some parameters; some ranks hold nothing of a role, which gives parts without pieces,
also of no element. Parameters that no rank used are isolated, and their parts have no gradient.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint

import torch
import torch.distributed as dist
from torch.nn import Parameter

from camshaft import Claim, Options, Plan, Plugin, hookimpl, host
from camshaft.models.init import materialize
from camshaft.parts import Part, Parts, Piece


class FlatOptions(Options):
    gives: list[str] = ["parameter_sums", "whole_parameters"]
    """Facts that it provides."""
    empty_gradients: bool = True
    """Whether parts without pieces get a gradient of zeros; else none."""


class FlatShards(Plugin):
    """Divides what the optimizer updates."""

    Options = FlatOptions

    @hookimpl
    def plan(self):
        return Plan(claims=(Claim("optimizer.layout", "dp"),), provides=tuple(self.options.gives))

    @hookimpl
    def materialize(self, world, model):
        materialize(model, seed=world.recipe.seed, device=world.device, dtype=world.policy.master)
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        rank, size = world.mesh.place["dp"], world.mesh.degree("dp")
        parts = []
        for number, role in enumerate(dict.fromkeys(world.roles.values())):
            names = [name for name in self.trained if world.roles[name] == role]
            if names:
                parts.append(self._part(role, names, *bounds(self._total(names), rank, size, number)))
        world.parts = Parts(parts, world.mesh.channel(self.name, "dp"))

    def _total(self, names):
        return sum(self.trained[name].numel() for name in names)

    def _part(self, role, names, begin, end):
        pieces, offset, place = [], 0, 3  # three elements of padding first
        for name in names:
            size = self.trained[name].numel()
            start, stop = max(begin - offset, 0), min(end - offset, size)
            if start < stop:
                pieces.append(Piece(name, tuple(self.trained[name].shape), start, place, stop - start))
                place += stop - start + len(pieces) % 3
            offset += size
        tensor = torch.zeros(place + 2 if pieces else 0, dtype=self.trained[names[0]].dtype)
        for piece in pieces:
            flat = self.trained[piece.name].detach().view(-1)
            tensor[piece.place : piece.place + piece.length] = flat[piece.start : piece.start + piece.length]
        return Part(Parameter(tensor), role, tuple(pieces))

    @hookimpl
    def reduce(self, state):
        unused = [name for name, p in self.trained.items() if p.grad is None]
        if unused:
            state.world.parts.isolate(unused, state.optimizer)
        for part in state.world.parts:
            used = [piece for piece in part.pieces if piece.name not in unused]
            assert used in ([], list(part.pieces)), "isolated"
            if used or (not part.pieces and self.options.empty_gradients):
                part.tensor.grad = torch.zeros_like(part.tensor)
                for piece, flat in part.slices(part.tensor.grad):
                    flat.copy_(self.trained[piece.name].grad.view(-1)[piece.start : piece.start + piece.length])

    @hookimpl
    def around_step(self, state, call):
        def step():
            call()
            own = [(piece, flat.clone()) for part in state.world.parts for piece, flat in part.slices(part.tensor.data)]
            everyone = [own]
            if state.world.parts.channel is not None:
                everyone = [None] * state.world.world_size
                dist.all_gather_object(everyone, own)
            for piece, values in (each for of_rank in everyone for each in of_rank):
                whole = self.trained[piece.name].data.view(-1)
                whole[piece.start : piece.start + piece.length] = values

        return step

    @hookimpl
    def post_step(self, state):
        for part in state.world.parts:
            padding = torch.ones(part.tensor.numel(), dtype=torch.bool)
            for _, flat in part.slices(padding):
                flat.fill_(False)
            assert not part.tensor.data[padding].any(), "padding stays 0"
            part.tensor.grad = None


def bounds(total, rank, size, number):
    """Uneven: rank r has a share of r + 1, in an order that differs from role to role; small roles lie on one rank."""
    if total < 200 and size > 1:
        return (0, total) if rank == number % size else (0, 0)
    shares = [(each + number) % size + 1 for each in range(size)]
    return tuple(total * sum(shares[:each]) // sum(shares) for each in (rank, rank + 1))


def install(monkeypatch):
    """Let recipes name ``flat_shards``; ranks are forked, so they inherit it."""
    known = host.installed()
    point = EntryPoint("flat_shards", "flat_shards:FlatShards", "camshaft.plugins")
    monkeypatch.setattr(host, "installed", lambda: {**known, "flat_shards": point})
