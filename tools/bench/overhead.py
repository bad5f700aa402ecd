"""What the engine costs: its step against a hand-written loop, on a model so small that only overhead is left."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_

from camshaft.data.loader import Loader
from tools.bench.setup import (
    MAX_NORM,
    Case,
    engine,
    engine_steps,
    median_ratio,
    plain_model,
    plain_optimizer,
    recipe_of,
    scratch,
    twin_loader,
)

CASE = Case("overhead", {"preset": "llama-nano"}, 32, 1, 4, "fp32", steps=25, blocks=40)


def hand_steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, loader: Loader, count: int) -> float:
    """The loop that somebody would write: four microbatches, clip, step."""
    total = 0.0
    for _ in range(count):
        window = loader.next()
        assert window is not None
        losses = []
        for batch in window.batches:
            loss = model(batch)
            (loss / window.weight).backward()
            losses.append(loss.detach())
        clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        total = float(torch.stack(losses).sum()) / window.weight
    return total


def run(blocks: int | None = None, names: Sequence[str] = ()) -> dict[str, Any]:
    """Interleave blocks of both loops over the same samples; losses must be equal to fp32's noise. One case only."""
    del names
    torch.set_num_threads(1)
    with scratch() as folder:
        resolved = recipe_of(CASE, 1, folder)
        with engine(resolved, 0, 1) as trainer:
            model = plain_model(resolved)
            optimizer, loader = plain_optimizer(model), twin_loader(trainer)
            ours: list[float] = []
            hand: list[float] = []
            gaps: list[float] = []
            for block in range((blocks or CASE.blocks) + 2):
                began = time.perf_counter()
                mine = engine_steps(trainer, CASE.steps)
                middle = time.perf_counter()
                theirs = hand_steps(model, optimizer, loader, CASE.steps)
                ended = time.perf_counter()
                gaps.append(abs(mine - theirs) / theirs)
                if block >= 2:  # two blocks to warm up
                    ours.append((middle - began) / CASE.steps)
                    hand.append((ended - middle) / CASE.steps)
            loader.close()
    paired = [one - other for one, other in zip(ours, hand, strict=True)]
    return {
        "what": "engine step over a hand-written loop, one process, 4 microbatches, llama-nano, fp32",
        "steps_per_block": CASE.steps,
        "blocks": len(ours),
        "engine_us": statistics.median(ours) * 1e6,
        "hand_us": statistics.median(hand) * 1e6,
        "ratio_of_medians": median_ratio(ours, hand),
        "overhead_us_paired_median": statistics.median(paired) * 1e6,
        "worst_relative_loss_gap": max(gaps),
    }
