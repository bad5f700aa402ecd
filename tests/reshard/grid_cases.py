"""Layouts in which axes of the model divide it, with and without data ranks, and one uneven model under all of them.

Tied embeddings of an odd vocabulary, 5 layers (not divisible by stages) of which one is frozen, two key and value heads
(copied where four ranks divide them), 7 samples short of a full last window never seen: runs end by steps.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path
from typing import Any

from reshard_cases import END, OPTIMIZERS, Make, Ran, train_rank

from camshaft.models.llama import Llama
from camshaft.plugin import Plugin, hookimpl
from camshaft.testing.ranks import run_ranks

FULL = os.environ.get("CAMSHAFT_FULL_MATRIX") == "1"
"""Whether each layout is read by each other one, not a sample of it."""
SEED = 4
FROZEN = "layers.1."
MODEL = {
    "vocab_size": 259,
    "hidden_size": 20,
    "intermediate_size": 36,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
}


class PartlyFrozen(Plugin):
    """Owns ``build_model``: one layer does not train."""

    @hookimpl
    def build_model(self, config: Any) -> Llama:
        model = Llama(config)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(FROZEN not in name)
        return model


@dataclass(frozen=True)
class Layout:
    """Degrees of the axes, and the plugins that work along them."""

    dp: int = 1
    tp: int = 1
    pp: int = 1
    plugins: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        return self.dp * self.tp * self.pp


DDP = {"ddp": {"bucket_size_mb": 0.005}}
TP: dict[str, Any] = {"tensor_parallel": {}}
SP = {"tensor_parallel": {"sequence_parallel": True}}
PP = {"pipeline": {"schedule": "1f1b"}}


def zero(stage: int) -> dict[str, Any]:
    return {"zero": {"stage": stage, **({"bucket_size_mb": 0.01} if stage < 3 else {})}}


LAYOUTS = {
    "plain": Layout(),
    "dp2": Layout(2, plugins=DDP),
    "tp2": Layout(tp=2, plugins=TP),
    "tp2+sp": Layout(tp=2, plugins=SP),
    "tp4": Layout(tp=4, plugins=TP),
    "pp2": Layout(pp=2, plugins=PP),
    "pp2 v": Layout(pp=2, plugins={"pipeline": {"schedule": "zbv"}}),
    "pp2 dp2": Layout(2, pp=2, plugins=PP | DDP),
    "pp2 zero3": Layout(2, pp=2, plugins=PP | zero(3)),
    "tp2 zero1": Layout(2, 2, plugins=TP | zero(1)),
    "tp2 zero2": Layout(2, 2, plugins=SP | zero(2)),
    "tp2 zero3": Layout(2, 2, plugins=TP | zero(3)),
    "tp2 pp2": Layout(tp=2, pp=2, plugins=SP | PP),
}
WIDE = {"tp2 pp2 zero1": Layout(2, 2, 2, SP | {"pipeline": {"schedule": "interleaved_1f1b"}} | zero(1))}


def pairs() -> list[tuple[str, str]]:
    """(written by, read by): all, or a sample in which each layout is written once and read once."""
    if FULL:
        return list(permutations([*LAYOUTS, *WIDE], 2))
    names = list(LAYOUTS)
    random.Random(SEED).shuffle(names)
    return list(zip(names, names[1:] + names[:1], strict=True))


def run_grid(make: Make, name: str, path: Path, *, optimizer: str, precision: Mapping[str, Any], **saves: Any) -> Ran:
    """Train a layout to step ``END`` with these options of ``checkpoint``."""
    layout = (LAYOUTS | WIDE)[name]
    resolved = make(
        {
            "ddp": None,
            **layout.plugins,
            **OPTIMIZERS[optimizer],
            "lr_schedule": {"type": "linear", "warmup_steps": 4, "min_lr_ratio": 0.1},
            "clip": {"max_norm": 0.1},
            "precision": dict(precision),
            "checkpoint": saves,
        },
        layout.ranks,
        model=MODEL,
        batch={"micro_batch_size": 4 // layout.dp, "global_batch_size": 12},
        training={"max_steps": END, "log_every": 1},
        run={"dir": str(path)},
        parallel={"tensor_parallel": layout.tp, "pipeline_parallel": layout.pp},
    )
    first: Ran = run_ranks(layout.ranks, train_rank, resolved, PartlyFrozen(), timeout_s=120)[0]
    return first
