"""What people use instead, as their documentation shows it: a bare loop, and torch's data-parallel family.

All take the engine's samples, first values, decay groups and clipping, and bf16 by autocast over fp32 weights.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils import clip_grad_norm_

from camshaft.data.loader import Batch
from camshaft.host_memory import keep_freed_memory
from camshaft.recipe import Resolved
from tools.bench.setup import (
    BUCKET_MB,
    MAX_NORM,
    Case,
    engine,
    engine_steps,
    plain_groups,
    plain_loader,
    plain_model,
    plain_optimizer,
)


@dataclass(frozen=True, slots=True)
class Job:
    """What one rank of a contestant is to train."""

    resolved: Resolved
    case: Case
    rank: int
    world_size: int


class Contestant(Protocol):
    """One rank of a contestant, built and ready to step."""

    def steps(self, count: int) -> float:
        """Run ``count`` windows; returns the last loss of this rank, per token."""

    def close(self) -> None:
        """Stop threads."""


class Camshaft:
    """The engine with the job's recipe."""

    def __init__(self, job: Job) -> None:
        self._stack = ExitStack()
        self._trainer = self._stack.enter_context(engine(job.resolved, job.rank, job.world_size))

    def steps(self, count: int) -> float:
        """Run ``count`` windows."""
        return engine_steps(self._trainer, count)

    def close(self) -> None:
        """Close every plugin."""
        self._stack.close()


class Bare:
    """A hand-written loop of one rank with torch's fused AdamW; those below replace the parts in which they differ."""

    def __init__(self, job: Job) -> None:
        self.job, self.narrow = job, job.case.compute == "bf16"
        self.model, self.optimizer = self.build(plain_model(job.resolved))
        self.loader = plain_loader(job.resolved, job.rank, job.world_size)

    def build(self, model: Module) -> tuple[Module, torch.optim.Optimizer]:
        """Wrap the model and make its optimizer."""
        return model, plain_optimizer(model)

    def micro_step(self, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a microbatch."""
        return nullcontext()

    def scale(self, loss: Tensor, weight: int) -> Tensor:
        """From the sum over a microbatch to what backward starts from; ``weight`` is this rank's of the window.

        The peers average gradients over ranks, and every rank has the same weight in these samples.
        """
        return loss / weight

    def forward(self, batch: Batch) -> Tensor:
        """Sum of the token losses of a microbatch."""
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.narrow):
            loss: Tensor = self.model(batch)
        return loss

    def steps(self, count: int) -> float:
        """Run ``count`` windows."""
        total = 0.0
        for _ in range(count):
            window = self.loader.next()
            assert window is not None
            losses = []
            for index, batch in enumerate(window.batches):
                with self.micro_step(index == len(window.batches) - 1):
                    loss = self.forward(batch)
                    self.backward(self.scale(loss, window.weight))
                losses.append(loss.detach())
            self.finish()
            total = float(torch.stack(losses).sum()) / window.weight
        return total

    def backward(self, loss: Tensor) -> None:
        """Backward of one microbatch."""
        loss.backward()  # type: ignore[no-untyped-call]

    def finish(self) -> None:
        """Clip and step."""
        clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def close(self) -> None:
        """Stop the loader's thread."""
        self.loader.close()


class Ddp(Bare):
    """DistributedDataParallel, with ``no_sync`` under accumulation."""

    def build(self, model: Module) -> tuple[Module, torch.optim.Optimizer]:
        """Wrap the model."""
        from torch.nn.parallel import DistributedDataParallel

        wrapped = DistributedDataParallel(model, bucket_cap_mb=int(BUCKET_MB))
        return wrapped, plain_optimizer(wrapped)

    def micro_step(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients travel in the last one."""
        return nullcontext() if last else self.model.no_sync()  # type: ignore[operator]


class KeptDdp(Ddp):
    """DistributedDataParallel with the engine's setting of the C library, to see what that alone is worth."""

    def build(self, model: Module) -> tuple[Module, torch.optim.Optimizer]:
        """Keep freed memory, then wrap the model."""
        assert keep_freed_memory(), "this machine's allocator has no such setting, or the environment has its own"
        return super().build(model)


class ZeroRedundancy(Ddp):
    """DDP with ZeroRedundancyOptimizer: the optimizer state is divided, each rank broadcasts what it updated."""

    def build(self, model: Module) -> tuple[Module, torch.optim.Optimizer]:
        """Wrap the model and divide its optimizer."""
        from torch.distributed.optim import ZeroRedundancyOptimizer

        wrapped, _ = super().build(model)
        optimizer = ZeroRedundancyOptimizer(
            plain_groups(wrapped), optimizer_class=torch.optim.AdamW, lr=1e-3, betas=(0.9, 0.95), fused=True
        )
        return wrapped, optimizer


class FullyShard(Bare):
    """``fully_shard`` of each layer and the root; sums gradients in each microbatch, as our stages and DeepSpeed do."""

    keep, narrow_gathers = False, False

    def build(self, model: Module) -> tuple[Module, torch.optim.Optimizer]:
        """Divide each layer, then the rest."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh("cpu", (self.job.world_size,))
        gathered, summed = (torch.bfloat16, torch.float32) if self.narrow_gathers else (None, None)
        policy = MixedPrecisionPolicy(gathered, summed, cast_forward_inputs=False)
        options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy}
        for layer in model.model.layers:  # type: ignore[union-attr]
            fully_shard(layer, reshard_after_forward=not self.keep, **options)
        fully_shard(model, reshard_after_forward=False, **options)
        return model, plain_optimizer(model)

    def micro_step(self, last: bool) -> AbstractContextManager[Any]:
        """Parameters that are kept stay until the window is over."""
        if self.keep and self.job.case.accumulation > 1:
            self.model.set_reshard_after_backward(last)  # type: ignore[operator]
        return nullcontext()


class FullyShardKeep(FullyShard):
    """The same, keeping parameters from forward to backward."""

    keep = True


class NarrowFullyShard(FullyShard):
    """Resharding, with its own mixed precision: parameters gathered in bf16, half the bytes."""

    narrow_gathers = True


class NarrowFullyShardKeep(NarrowFullyShard):
    """Keeping, with its own mixed precision."""

    keep = True
