"""The part that needs torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import Parameter

from camshaft.comm import Channel
from camshaft.state import State


class Sparse:
    """Gradients of a rank, of which the largest entries travel, and the error that stays behind."""

    def __init__(self, state: State, channel: Channel, ratio: float, key: str) -> None:
        self._state, self._channel, self._key = state, channel, key
        self._named = {name: each for name, each in state.model.named_parameters() if each.requires_grad}
        self._counts = {name: math.ceil(ratio * each.numel()) for name, each in self._named.items()}
        self._errors: dict[str, Tensor] = {}
        for name, each in self._named.items():
            self._errors[name] = torch.zeros_like(each, dtype=each.grad_dtype or each.dtype).view(-1)

    def reduce(self) -> None:
        """Every gradient becomes the sum of what all ranks send of it; one that no rank has stays away."""
        if not self._named:
            return
        wanted = {name: self._corrected(name, each) for name, each in self._named.items()}
        chosen = {name: _largest(each, self._counts[name]) for name, each in wanted.items()}
        values = torch.cat([wanted[name][index] for name, index in chosen.items()])
        used = torch.tensor([each.grad is not None for each in self._named.values()])
        sent = torch.cat([values, used.to(values)])
        all_values, all_indexes = self._gather(sent), self._gather(torch.cat(list(chosen.values())))
        anyone = all_values[:, len(values) :].sum(0).tolist()
        start = 0
        for (name, parameter), users in zip(self._named.items(), anyone, strict=True):
            stretch = slice(start, start + self._counts[name])
            start = stretch.stop
            if users:
                self._errors[name] = wanted[name].index_fill(0, chosen[name], 0)
                parameter.grad = self._sum(parameter, all_values[:, stretch], all_indexes[:, stretch])

    def _corrected(self, name: str, parameter: Parameter) -> Tensor:
        error = self._errors[name]
        return error if parameter.grad is None else error + parameter.grad.reshape(-1)

    def _gather(self, own: Tensor) -> Tensor:
        """[ranks, size of ``own``]: of every rank."""
        every = torch.empty(self._channel.size * own.numel(), dtype=own.dtype, device=own.device)
        self._channel.all_gather(every, own, "reduce").wait()
        return every.view(self._channel.size, -1)

    def _sum(self, parameter: Parameter, values: Tensor, indexes: Tensor) -> Tensor:
        """One rank after the other, in the same order everywhere."""
        found = torch.zeros(parameter.numel(), dtype=values.dtype, device=values.device)
        for value, index in zip(values, indexes, strict=True):
            found[index] += value  # an index is there once for each rank
        return found.view_as(parameter)

    def make_room(self) -> None:
        """Zeros beside the state of what the optimizer has updated."""
        optimizer, parts = self._state.optimizer, list(self._state.world.parts)
        stateless = not any(optimizer.state.get(part.tensor) for part in parts)
        for part in parts:
            if (stateless or optimizer.state.get(part.tensor)) and self._key not in optimizer.state[part.tensor]:
                optimizer.state[part.tensor][self._key] = torch.zeros_like(part.tensor, requires_grad=False)

    def give(self) -> None:
        """The sum of all ranks' errors goes beside the optimizer's state, and an equal part of it to each rank."""
        for part in self._state.world.parts:
            total = self._errors[part.pieces[0].name]
            self._channel.all_reduce(total, "state_dict").wait()
            kept = self._state.optimizer.state.get(part.tensor, {}).get(self._key)
            if kept is not None:
                kept.copy_(total.view_as(kept))
            total.div_(self._channel.size)

    def take(self) -> None:
        """The other way round."""
        for part in self._state.world.parts:
            kept = self._state.optimizer.state.get(part.tensor, {}).get(self._key)
            if kept is not None:
                error = self._errors[part.pieces[0].name]
                error.copy_(kept.view(-1)).div_(self._channel.size)


def _largest(values: Tensor, count: int) -> Tensor:
    """Indexes of the entries with the largest absolute values."""
    return values.abs().topk(count, sorted=False).indices
