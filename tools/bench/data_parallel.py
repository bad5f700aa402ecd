"""Data parallel on two ranks: tokens a second against torch's DistributedDataParallel, interleaved in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from camshaft.data import prepare
from camshaft.data.loader import Loader
from camshaft.recipe import Resolved
from camshaft.testing.ranks import run_ranks
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

CASES = (
    Case("tiny", {"preset": "llama-tiny"}, 128, 8, 1, "bf16", steps=4, blocks=30),
    Case("tiny-accumulated", {"preset": "llama-tiny"}, 128, 4, 4, "bf16", steps=2, blocks=30),
    Case("small", {"preset": "llama-small"}, 128, 4, 1, "bf16", steps=1, blocks=24),
)
PEERS: dict[str, dict[str, Any]] = {
    "DDP": {},
    "DDP, gradients as views": {"gradient_as_bucket_view": True},
}


class Peer:
    """A loop around DistributedDataParallel as its documentation shows it, with ``no_sync`` under accumulation."""

    def __init__(self, resolved: Resolved, loader: Loader, compute: str, options: dict[str, Any]) -> None:
        self.model = DistributedDataParallel(plain_model(resolved), **options)
        self.optimizer = plain_optimizer(self.model)
        self.loader, self.narrow = loader, compute == "bf16"

    def steps(self, count: int) -> float:
        """Run ``count`` windows; returns the last loss of this rank."""
        total = 0.0
        for _ in range(count):
            window = self.loader.next()
            assert window is not None
            losses = []
            for index, batch in enumerate(window.batches):
                last = index == len(window.batches) - 1
                with nullcontext() if last else self.model.no_sync():
                    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.narrow):
                        loss = self.model(batch)
                    # DDP divides by the number of ranks; every rank has the same weight in these samples.
                    (loss / window.weight).backward()
                losses.append(loss.detach())
            clip_grad_norm_(self.model.parameters(), MAX_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad()
            total = float(torch.stack(losses).sum()) / window.weight
        return total


def timed(function: Callable[[int], float], count: int) -> tuple[float, float]:
    """(seconds a step, last loss), from a barrier to the slowest rank's end."""
    dist.barrier()
    began = time.perf_counter()
    loss = function(count)
    dist.barrier()
    return (time.perf_counter() - began) / count, loss


def on_rank(rank: int, world_size: int, resolved: Resolved, case: Case, blocks: int) -> dict[str, Any]:
    """Interleave the engine and every peer; the order changes from block to block."""
    with engine(resolved, rank, world_size) as trainer:
        peers = {name: Peer(resolved, twin_loader(trainer), case.compute, options) for name, options in PEERS.items()}
        runners: dict[str, Callable[[int], float]] = {"Camshaft": lambda count: engine_steps(trainer, count)}
        runners |= {name: peer.steps for name, peer in peers.items()}
        times: dict[str, list[float]] = {name: [] for name in runners}
        losses: dict[str, float] = {}
        names = list(runners)
        for block in range(blocks + 1):
            for name in names[block % len(names) :] + names[: block % len(names)]:
                seconds, losses[name] = timed(runners[name], case.steps)
                if block:  # the first warms up
                    times[name].append(seconds)
        for peer in peers.values():
            peer.loader.close()
    return {"times": times, "losses": losses}


def run(blocks: int | None = None, names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Every case, or those of these names, on two forked ranks, one thread each."""
    rows = []
    for case in (case for case in CASES if not names or case.name in names):
        with scratch() as folder:
            resolved = recipe_of(case, 2, folder)
            prepare(resolved)
            found = run_ranks(2, on_rank, resolved, case, blocks or case.blocks, timeout_s=900)[0]
        tokens = 2 * case.micro_batch_size * case.accumulation * case.sequence_length
        ours = found["times"]["Camshaft"]
        for name, times in found["times"].items():
            rows.append(
                {
                    "case": case.name,
                    "contestant": name,
                    "step_ms": statistics.median(times) * 1e3,
                    "tokens_per_s": tokens / statistics.median(times),
                    "camshaft_speed_over_it": median_ratio(times, ours),
                    "last_loss": found["losses"][name],
                    "blocks": len(times),
                    "steps_per_block": case.steps,
                }
            )
    return rows
