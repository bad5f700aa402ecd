"""Muon over parts: momentum where the pieces are, orthogonalisation where a matrix is whole."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from camshaft.exchange import Arriving, Departing, Exchange, Held, Round
from camshaft.models.groups import DECAYING
from camshaft.parts import Part
from camshaft_muon.choice import hidden
from camshaft_muon.newton_schulz import cost, orthogonalize, scale

if TYPE_CHECKING:
    from camshaft.state import World
    from camshaft_muon import Options

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


class Muon(Optimizer):
    """Muon for those of ``names`` that have two dimensions, AdamW for all others.

    State: ``momentum_buffer`` shaped like the tensor, or what torch's AdamW keeps. Parts that hold a hidden matrix
    beside others are split first. Construction and steps are collective over ``parts.holders``.
    """

    def __init__(self, world: World, names: Collection[str], options: Options) -> None:
        parts, self._names = world.parts, hidden(world.parts, names)
        matrices = (piece.name for part in parts if part.role == "matrix" for piece in part.pieces)
        parts.isolate(name for name in matrices if name not in self._names)
        self._parts, self._options = parts, options
        super().__init__(self._groups(options), {})
        adam = options.adamw
        beta1, beta2 = adam.betas
        self._adamw = AdamW(self.param_groups[1:], lr=adam.lr, betas=(beta1, beta2), eps=adam.eps, fused=True)
        self._dtype = iteration_dtype(options.iteration_dtype, world.policy.master, world.device)
        limit = int(options.round_mb * 2**20) // self._dtype.itemsize
        self._exchange = Exchange(parts, self._names, self._dtype, world.device, cost=cost, limit=max(limit, 1))

    @property
    def hidden(self) -> frozenset[str]:
        """Names of all matrices that Muon updates, on whichever rank they lie."""
        return frozenset(self._exchange.shapes)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # the engine gives no closure
        """Update every part that has a gradient. Ranks that have none work on the others' matrices all the same."""
        self._adamw.param_groups, self._adamw.state = self.param_groups[1:], self.state
        self._adamw.step()
        self._advance()
        rounds = self._exchange.rounds
        arriving = self._send(rounds[0]) if rounds else None
        leaving: list[tuple[Round, Departing]] = []
        for number, current in enumerate(rounds):
            # The next round travels to its owners, and the last one back, while this one is worked on.
            coming = self._send(rounds[number + 1]) if number + 1 < len(rounds) else None
            assert arriving is not None
            whole = arriving.wait()
            results = {name: orthogonalize(matrix, self._options.iterations) for name, matrix in whole.items()}
            leaving.append((current, self._exchange.from_owners(current, results)))
            if len(leaving) > 1:
                self._apply(*leaving.pop(0))
            arriving = coming
        for current, departing in leaving:
            self._apply(current, departing)

    def _groups(self, options: Options) -> list[dict[str, Any]]:
        """Three groups on every rank, also where one is empty: ranks agree on the rate of the first."""
        groups: list[dict[str, Any]] = [
            {"params": [], "lr": options.lr, "weight_decay": options.weight_decay, "momentum": options.momentum},
            {"params": [], "weight_decay": options.adamw.weight_decay},
            {"params": [], "weight_decay": 0.0},
        ]
        for part in self._parts:
            place = 0 if self._hidden(part) else 1 if part.role in DECAYING else 2
            groups[place]["params"].append(part.tensor)
        return groups

    def _hidden(self, part: Part) -> bool:
        return part.role == "matrix" and all(piece.name in self._names for piece in part.pieces)

    def _advance(self) -> None:
        """Momentum and decay, element by element."""
        group = self.param_groups[0]
        tensors = [tensor for tensor in group["params"] if tensor.grad is not None]
        for tensor in tensors:
            if not self.state[tensor]:
                self.state[tensor]["momentum_buffer"] = torch.zeros_like(tensor)
        if tensors:
            buffers = [self.state[tensor]["momentum_buffer"] for tensor in tensors]
            torch._foreach_lerp_(buffers, [tensor.grad for tensor in tensors], 1 - group["momentum"])
            torch._foreach_mul_(tensors, 1 - group["lr"] * group["weight_decay"])

    def _send(self, current: Round) -> Arriving:
        return self._exchange.to_owners(current, [self._update(held) for held in self._exchange.held(current)])

    def _update(self, held: Held) -> Tensor:
        """What is orthogonalised, of one piece; 0 where the parameter has no gradient, and then nobody reads it."""
        gradient = held.part.tensor.grad
        if gradient is None:
            return torch.zeros(held.piece.length, dtype=self._dtype, device=held.part.tensor.device)
        momentum = held.of(self.state[held.part.tensor]["momentum_buffer"])
        if self._options.nesterov:
            momentum = held.of(gradient).lerp(momentum, self.param_groups[0]["momentum"])
        return momentum.to(self._dtype)

    def _apply(self, current: Round, departing: Departing) -> None:
        lr = self.param_groups[0]["lr"]
        for held, update in zip(self._exchange.held(current), departing.wait(), strict=True):
            if held.part.tensor.grad is not None:
                rate = lr * scale(held.piece.whole_shape, self._options.scaling)
                held.of(held.part.tensor.view(-1)).add_(update, alpha=-rate)


def iteration_dtype(wanted: str, master: torch.dtype, device: torch.device) -> torch.dtype:
    """The option's dtype; ``auto``: the masters', but bf16 on GPUs from compute capability 8.0."""
    if wanted != "auto":
        return DTYPES[wanted]
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if fast and master != torch.float64 else torch.promote_types(master, torch.float32)
