"""Pipelines on 2 and 4 ranks against ``torch.distributed.pipelining``: same stages, samples, optimizer and clipping."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from camshaft_pipeline.schedules import make
from tools.bench import peers
from tools.bench.peers import Job
from tools.bench.peers_pipeline import TorchPipeline, decoder_stages
from tools.bench.setup import Case
from tools.bench.sharded import Entry, Target, joined, measure, only

LAYERS, MICROBATCHES = 8, 8
MODEL = {"preset": "llama-tiny", "num_hidden_layers": LAYERS, "tie_word_embeddings": False}
"""torch's stages know nothing of tied parameters, so there are none."""
RACES = ("gpipe", "1f1b", "interleaved_1f1b", "zbv")
RANKS = (2, 4)
OURS, TORCH = "Camshaft", "torch"
CONTESTANTS = (OURS, TORCH)
TARGETS: tuple[Target, ...] = ((OURS, TORCH, 1.0),)


def case_of(schedule: str, ranks: int) -> Case:
    """One schedule on so many ranks: a race of its own."""
    return Case(f"{schedule}-{ranks}", MODEL, 128, 2, MICROBATCHES, "fp32", steps=2, blocks=8)


def placement_of(schedule: str, ranks: int) -> tuple[int, ...]:
    """Stage to rank: there and back for ZBV and DualPipeV, round and round for the others."""
    return make(schedule, ranks, ranks).placement


def own_stages(schedule: str, job: Job) -> tuple[list[int], int]:
    """Stages of the job's rank, and how many there are in all."""
    placement = placement_of(schedule, job.world_size)
    return [stage for stage, rank in enumerate(placement) if rank == job.rank], len(placement)


def torch_pipeline(schedule: str, job: Job) -> TorchPipeline:
    """Torch's contestant: every stage has as many layers as every other, as ours are told to have."""
    own, count = own_stages(schedule, job)
    share = LAYERS // count
    spans = [(index * share, (index + 1) * share) for index in range(count)]
    return TorchPipeline(job, schedule, decoder_stages(job, spans, own), own, count)


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
    races = [(schedule, ranks) for ranks in RANKS for schedule in RACES]
    return joined(
        measure(case_of(*race), only(entries_of(*race), contestants), race[1], blocks, TARGETS)
        for race in races
        if not names or case_of(*race).name in names
    )
