"""DeepSpeed's ZeRO stages, with torch's fused AdamW as its client optimizer, and its own accumulation and clipping."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from camshaft.data.loader import Batch
from tools.bench.peers import Bare
from tools.bench.setup import BUCKET_MB, MAX_NORM, Case, plain_optimizer

KERNEL = "deepspeed_shm_comm"
"""A C++ extension for collectives between processes of one machine, which DeepSpeed would compile for minutes."""


def config(stage: int, case: Case) -> dict[str, Any]:
    """DeepSpeed's own defaults but for buckets: its 500 million elements are more than these models have."""
    elements = int(BUCKET_MB * 2**20) // 4
    return {
        "train_micro_batch_size_per_gpu": case.micro_batch_size,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": MAX_NORM,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": elements,
            "stage3_prefetch_bucket_size" if stage == 3 else "allgather_bucket_size": elements,
        },
    }


class Autocast(Module):
    """Autocast inside of the module: DeepSpeed switches off one that is outside of its engine."""

    def __init__(self, inner: Module, narrow: bool) -> None:
        super().__init__()
        self.inner, self.narrow = inner, narrow

    def forward(self, batch: Batch) -> Tensor:
        """Sum of the token losses."""
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.narrow):
            loss: Tensor = self.inner(batch)
        return loss


class DeepSpeed(Bare):
    """One stage; DeepSpeed's engine does backward, reduction, clipping and step."""

    stage = 1

    def build(self, model: Module) -> tuple[Module, torch.optim.Optimizer]:
        """Hand model and optimizer over."""
        os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(self.job.rank)}
        warnings.filterwarnings("ignore", category=FutureWarning)
        import deepspeed.ops

        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        deepspeed.ops.__compatible_ops__[KERNEL] = False
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
        wrapped = Autocast(model, self.narrow)
        self.engine, optimizer, _, _ = deepspeed.initialize(
            model=wrapped,
            optimizer=plain_optimizer(wrapped),
            config=config(self.stage, self.job.case),
            dist_init_required=False,
        )
        return self.engine, optimizer

    def forward(self, batch: Batch) -> Tensor:
        """Sum of the token losses; the module casts."""
        loss: Tensor = self.engine(batch)
        return loss

    def scale(self, loss: Tensor, weight: int) -> Tensor:
        """DeepSpeed divides by the number of microbatches."""
        return loss * (self.job.case.accumulation / weight)

    def backward(self, loss: Tensor) -> None:
        """Backward, and the step if this was the window's last."""
        self.engine.backward(loss)
        self.engine.step()

    def finish(self) -> None:
        """Done in ``backward``."""

    def close(self) -> None:
        """Remove DeepSpeed's hooks."""
        super().close()
        self.engine.destroy()


class DeepSpeed2(DeepSpeed):
    """Stage 2."""

    stage = 2


class DeepSpeed3(DeepSpeed):
    """Stage 3."""

    stage = 3
