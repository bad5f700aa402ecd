"""Pipelines on 2 and 4 ranks against ``torch.distributed.pipelining``: same stages, samples, optimizer and clipping."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from camshaft_pipeline.schedule import loop_placement, v_placement
from tools.bench import peers, peers_pipeline
from tools.bench.peers import Job
from tools.bench.setup import Case
from tools.bench.sharded import Entry, Target, joined, measure, only

LAYERS, MICROBATCHES = 8, 8
MODEL = {"preset": "llama-tiny", "num_hidden_layers": LAYERS, "tie_word_embeddings": False}
"""torch's stages know nothing of tied parameters, so there are none."""
SHARES = {"gpipe": 1, "1f1b": 1, "interleaved_1f1b": 2, "zbv": 2}
"""Schedule to stages of a rank."""
RANKS = (2, 4)
OURS, TORCH = "Camshaft", "torch"
CONTESTANTS = (OURS, TORCH)
TARGETS: tuple[Target, ...] = ((OURS, TORCH, 1.0),)


def case_of(schedule: str, ranks: int) -> Case:
    """One schedule on so many ranks: a race of its own."""
    return Case(f"{schedule}-{ranks}", MODEL, 128, 2, MICROBATCHES, "fp32", steps=2, blocks=8)


def placement_of(schedule: str, ranks: int) -> tuple[int, ...]:
    """Stage to rank: V for ZBV, round and round for the others."""
    return v_placement(ranks) if schedule == "zbv" else loop_placement(ranks, SHARES[schedule])


def torch_pipeline(schedule: str, job: Job) -> peers_pipeline.TorchPipeline:
    """Torch's contestant: every stage has as many layers as every other, as ours are told to have."""
    ranks = job.world_size
    placement = placement_of(schedule, ranks)
    share = LAYERS // len(placement)
    spans = [(index * share, (index + 1) * share) for index in range(len(placement))]
    own = [stage for stage, rank in enumerate(placement) if rank == job.rank]
    made, multiple = peers_pipeline.schedule_class(schedule)
    return peers_pipeline.TorchPipeline(job, made, spans, own, multiple)


def entries_of(schedule: str, ranks: int) -> dict[str, Entry]:
    """Both contestants of a race."""
    divided_by = {"pipeline": {"schedule": schedule, "split": {"balance": "layers"}}}
    parallel = {"pipeline_parallel": ranks}
    return {
        OURS: Entry(peers.Camshaft, divided_by, parallel=parallel),
        TORCH: Entry(partial(torch_pipeline, schedule), divided_by, parallel=parallel),
    }


def run(blocks: int | None, names: Sequence[str] = (), contestants: Sequence[str] = ()) -> dict[str, Any]:
    """Speed and memory of each schedule on each number of ranks, or of the cases of these names (``zbv-2``)."""
    races = [(schedule, ranks) for ranks in RANKS for schedule in SHARES]
    return joined(
        measure(case_of(*race), only(entries_of(*race), contestants), race[1], blocks, TARGETS)
        for race in races
        if not names or case_of(*race).name in names
    )
