"""The parity matrix as data: every value of every factor, what a combination is as a recipe, and which ones run."""

from __future__ import annotations

import os
import random
from dataclasses import astuple, dataclass
from itertools import combinations, product

FULL = os.environ.get("CAMSHAFT_FULL_MATRIX", "")
"""``1``: all on up to ``FEW`` ranks, and of larger ones those of the sample; ``every``: all of them; both write the
page of results. Else every third combination of a sample that covers every pair.
"""
FEW = 4

SEED = 23
BATCH, STEPS, ACCUMULATION = 12, 8, 3
BUCKET = 0.01
"""MiB: several buckets even for this small model, and parameters larger than one."""

SHARD = 2
DATA = {
    "none": {},
    "ddp": {"ddp": {"bucket_size_mb": BUCKET}},
    "zero 1": {"zero": {"stage": 1, "bucket_size_mb": BUCKET}},
    "zero 2": {"zero": {"stage": 2, "bucket_size_mb": BUCKET}},
    "zero 3": {"zero": {"stage": 3}},
    "hybrid": {"zero": {"stage": 3}},
    "fully_shard": {"zero": {"stage": 3, "provider": "torch"}},
    "deepspeed": {"deepspeed": {"stage": 2}},
}
"""The data-parallel family: two data ranks each, ``hybrid`` two copies on two ranks each, ``none`` one rank."""
LIBRARIES = ("fully_shard", "deepspeed")
"""Members of the family that a library provides; they are here for what is refused as much as for what runs."""
TENSOR = {
    "-": {},
    "tp": {"tensor_parallel": {}},
    "tp + sp": {"tensor_parallel": {"sequence_parallel": True}},
}
SCHEDULES = ("gpipe", "1f1b", "interleaved_1f1b", "zb_h1", "zbv", "dualpipe_v")
PIPELINE = {"-": {}, **{name: {"pipeline": {"schedule": name}} for name in SCHEDULES}}
LONG = ("zbv", "dualpipe_v")
"""Schedules that take more microbatches to leave their first phase: they get twice as many where the batch allows."""

ADAMW = {"adamw": {"lr": 3e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}}
SGD = {"sgd": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}}
NUMBERS = {
    "fp64 AdamW": (ADAMW, "fp64", "tied"),
    "fp64 SGD": (SGD, "fp64", "untied"),
    "bf16 AdamW": (ADAMW, "bf16", "tied"),
}
"""Optimizer, precision and model. ``untied`` has biases, norms of heads and one key head, and no shared embedding."""

MODEL = {
    "vocab_size": 259,  # odd: no degree of tensor parallel divides it
    "hidden_size": 20,
    "intermediate_size": 38,
    "num_hidden_layers": 5,  # neither 2 nor 4 stages divide it
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
}
MODELS = {
    "tied": MODEL,
    "untied": MODEL | {"tie_word_embeddings": False, "num_key_value_heads": 1, "attention_bias": True, "qk_norm": True},
}


@dataclass(frozen=True, order=True)
class Combination:
    """One value of each factor."""

    data: str
    tensor: str
    pipeline: str
    numbers: str

    def __str__(self) -> str:
        return ", ".join(astuple(self))

    @property
    def compute(self) -> str:
        return NUMBERS[self.numbers][1]

    @property
    def plugins(self) -> tuple[str, ...]:
        """Plugins that divide something."""
        return (*DATA[self.data], *TENSOR[self.tensor], *PIPELINE[self.pipeline])

    @property
    def data_ranks(self) -> int:
        return {"none": 1, "hybrid": 2 * SHARD}.get(self.data, 2)

    @property
    def ranks(self) -> int:
        return self.data_ranks * (1 + (self.tensor != "-")) * (1 + (self.pipeline != "-"))

    @property
    def accumulation(self) -> int:
        """Microbatches of a window on each data rank."""
        wanted = 2 * ACCUMULATION if self.pipeline in LONG else ACCUMULATION
        return wanted if BATCH % (wanted * self.data_ranks) == 0 else ACCUMULATION


def promised(combination: Combination) -> bool:
    """Whether this must run; what is not promised must be refused."""
    alone = combination.tensor == combination.pipeline == "-"
    if combination.data == "deepspeed":
        return alone and combination.compute != "fp64"
    return alone or combination.data != "fully_shard"


def everything() -> list[Combination]:
    """Every triple of data, tensor and pipeline in fp64, optimizers in turn; in bf16 all with one of them switched off.

    Members that a library provides are in every triple too; most of those are refused.
    """
    found = []
    fp64 = [name for name, (_, compute, _) in NUMBERS.items() if compute == "fp64"]
    for row, data in enumerate(DATA):
        for column, (tensor, pipeline) in enumerate(product(TENSOR, PIPELINE)):
            found.append(Combination(data, tensor, pipeline, fp64[(row + column) % len(fp64)]))
            if data in (*LIBRARIES, "none") or "-" in (tensor, pipeline):
                found.append(Combination(data, tensor, pipeline, "bf16 AdamW"))
    return found


Pair = tuple[tuple[int, str], tuple[int, str]]


def pairs(combination: Combination) -> set[Pair]:
    """Every two values that stand together in it, each with the number of its factor."""
    return set(combinations(enumerate(astuple(combination)), 2))


def cost(combination: Combination) -> float:
    """What it takes to run it, in no unit; fp64 tells more than bf16, so it counts as cheaper."""
    return (4 + combination.ranks + combination.ranks**2 / 10) * (1 if combination.compute == "fp64" else 1.2)


def measured() -> list[Combination]:
    """Promised combinations that the page has, at least: all on few ranks, and those of the sample on more."""
    drawn = set(sample())
    return [each for each in everything() if promised(each) and (each.ranks <= FEW or each in drawn)]


def sample(seed: int = SEED) -> list[Combination]:
    """Promised combinations that have every pair of values among them, few ranks preferred; equal for equal seeds."""
    left = [each for each in everything() if promised(each)]
    wanted = set().union(*map(pairs, left))
    random.Random(seed).shuffle(left)
    chosen = []
    while wanted:
        best = max(left, key=lambda each: len(pairs(each) & wanted) / cost(each))
        chosen.append(best)
        wanted -= pairs(best)
    return sorted(chosen)


def briefly() -> list[Combination]:
    """Every third one of the sample: the others are left to runs on demand, and to the page that they write."""
    return sample()[::3]


CASES = {"": briefly, "1": measured, "every": lambda: [each for each in everything() if promised(each)]}[FULL]()
"""What is trained."""


def plugins(combination: Combination) -> dict[str, object]:
    """The plugins of its recipe; what stands for nothing in a recipe of this folder is switched off."""
    optimizer, compute, _ = NUMBERS[combination.numbers]
    return {
        "ddp": None,  # make_recipe has it unless told otherwise
        **DATA[combination.data],
        **TENSOR[combination.tensor],
        **PIPELINE[combination.pipeline],
        **optimizer,
        "lr_schedule": {"type": "linear", "warmup_steps": 4, "min_lr_ratio": 0.1},
        "clip": {"max_norm": 0.1},
        "precision": {"compute": compute},
    }


def sections(combination: Combination, steps: int = STEPS) -> dict[str, object]:
    """Sections of its recipe that differ from ``make_recipe``'s."""
    degrees = {
        "tensor_parallel": 1 + (combination.tensor != "-"),
        "pipeline_parallel": 1 + (combination.pipeline != "-"),
        "data_parallel_shard": SHARD if combination.data == "hybrid" else None,
    }
    return {
        "model": MODELS[NUMBERS[combination.numbers][2]],
        "batch": {
            "micro_batch_size": BATCH // (combination.accumulation * combination.data_ranks),
            "global_batch_size": BATCH,
        },
        "training": {"max_steps": steps, "log_every": 1},
        "parallel": {name: degree for name, degree in degrees.items() if degree not in (None, 1)},
    }
