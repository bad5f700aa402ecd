"""Optimizers as their papers write them: one parameter at a time, nothing shared with the plugins."""

from __future__ import annotations

import math

import torch
from torch.optim import Optimizer


class Textbook(Optimizer):
    """Groups name their ``rule``; state is made by it."""

    def __init__(self, groups):
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    group["rule"](parameter, parameter.grad, self.state[parameter], group)


def lion(x, g, state, group):
    """Chen et al., algorithm 2."""
    (b1, b2), lr = group["betas"], group["lr"]
    m = state.get("exp_avg", torch.zeros_like(x))
    c = b1 * m + (1 - b1) * g
    x.copy_(x - lr * (torch.sign(c) + group["weight_decay"] * x))
    state["exp_avg"] = b2 * m + (1 - b2) * g


def adam_direction(x, g, state, group):
    b1, b2 = group["betas"]
    t = state["step"] = state.get("step", torch.zeros(())) + 1
    m = state["exp_avg"] = b1 * state.get("exp_avg", 0) + (1 - b1) * g
    v = state["exp_avg_sq"] = b2 * state.get("exp_avg_sq", 0) + (1 - b2) * g * g
    return (m / (1 - b1 ** float(t))) / ((v / (1 - b2 ** float(t))).sqrt() + group["eps"])


def adamw(x, g, state, group):
    """Loshchilov and Hutter, algorithm 2."""
    u = adam_direction(x, g, state, group)
    x.copy_(x - group["lr"] * (u + group["weight_decay"] * x))


def lamb(x, g, state, group):
    """You et al., algorithm 2."""
    u = adam_direction(x, g, state, group) + group["weight_decay"] * x
    w_norm, u_norm = float((x * x).sum()) ** 0.5, float((u * u).sum()) ** 0.5
    ratio = min(w_norm / u_norm, group["limit"]) if w_norm and u_norm and group["adapt"] else 1.0
    x.copy_(x - group["lr"] * ratio * u)


def adafactor(x, g, state, group):
    """Shazeer and Stern, algorithm 6 with the second moment of algorithm 4 without its factors."""
    t = state["step"] = state.get("step", torch.zeros(())) + 1
    b2 = 1 - float(t) ** -0.8
    v = state["exp_avg_sq"] = b2 * state.get("exp_avg_sq", 0) + (1 - b2) * (g * g + 1e-30)
    u = g / v.sqrt()
    u = u / max(1.0, float((u * u).mean()) ** 0.5 / group["limit"])
    scale = max(1e-3, float((x * x).mean()) ** 0.5) if group["scaled"] else 1.0
    x.copy_(x - group["lr"] * group["weight_decay"] * x - group["lr"] * scale * u)


def muon(x, g, state, group):
    """Jordan et al. 2024, with the momentum as torch writes it (an average)."""
    mu = group["momentum"]
    b = state["momentum_buffer"] = mu * state.get("momentum_buffer", 0) + (1 - mu) * g
    u = (1 - mu) * g + mu * b if group["nesterov"] else b
    rows, columns = x.shape
    factor = max(1, rows / columns) ** 0.5 if group["scaling"] == "original" else 0.2 * math.sqrt(max(rows, columns))
    step = newton_schulz(u, group["iterations"])
    x.copy_(x - group["lr"] * group["weight_decay"] * x - group["lr"] * factor * step)


def newton_schulz(g, iterations):
    """Odd polynomial of the matrix: a X + b (X X') X + c (X X')^2 X."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g / max(float(g.pow(2).sum()) ** 0.5, 1e-7)
    for _ in range(iterations):
        xx = x @ x.T
        x = a * x + b * xx @ x + c * xx @ xx @ x
    return x


def split(model, rule, **group):
    """Two groups as the plugins make them: matrices and embeddings decay, vectors do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    decaying = {"params": [p for p in trained if p.ndim >= 2], "rule": rule, **group}
    plain = {"params": [p for p in trained if p.ndim < 2], "rule": rule, **group, "weight_decay": 0.0}
    return decaying, plain
