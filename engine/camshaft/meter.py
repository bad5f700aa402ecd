"""Records of metrics: one copy from the device to the host each time, sums over the ranks that split the batch."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import torch

from camshaft.data.loader import evaluation_batches
from camshaft.datasheet import peak, type_name
from camshaft.state import State, World

if TYPE_CHECKING:
    from camshaft.data import Prepared
    from camshaft.hookspecs import Forward


def global_sums(world: World, *values: torch.Tensor | float) -> list[float]:
    """Sum scalars over every axis that splits the batch, in fp64 on the device, and copy them to the host once.

    Values of what only the last part of a pipeline makes, so a rank that makes no loss adds 0, whatever it gives.
    """
    total = torch.stack(
        [torch.as_tensor(value, dtype=torch.float64, device=world.device).reshape(()) for value in values]
    )
    if not world.makes_loss:
        total.fill_(0.0)
    for axis in world.mesh.shape.axes:
        if (axis.splits_batch or axis.name == "pp") and axis.degree > 1:
            channel = world.mesh.channel("core", axis.name)
            assert channel is not None
            channel.all_reduce(total, "log").wait()
    return [float(value) for value in total.tolist()]


class Meter:
    """Counts time and tokens between records."""

    def __init__(self, state: State) -> None:
        self.state = state
        self._flops = state.config.flops_per_token(state.world.recipe.data.sequence_length)
        self._peak = None
        if state.world.device.type == "cuda":
            fast = torch.get_float32_matmul_precision() != "highest"
            kind = type_name(state.world.policy.compute, tf32=fast)
            self._peak = peak(torch.cuda.get_device_name(state.world.device), kind)
        self.start()

    def start(self) -> None:
        """Begin a new interval."""
        self._began, self._waited = time.perf_counter(), self.state.loader.wait_s
        self._steps = self._tokens = 0

    def count(self, tokens: int) -> None:
        """Count one step of ``tokens`` tokens over all ranks."""
        self._steps += 1
        self._tokens += tokens

    def record(self) -> dict[str, float | int]:
        """The record of the step just done; rates are means since the last record. Starts a new interval."""
        state = self.state
        loss, weight = global_sums(
            state.world,
            state.loss if state.loss is not None else 0.0,
            float(state.window.weight if state.window is not None else 0),
        )
        record: dict[str, float | int] = dict(self._progress())
        record["train/loss"] = loss / max(weight, 1.0)
        if state.grad_norm is not None:
            record["train/grad_norm"] = float(state.grad_norm)
        record["train/lr"] = state.lr
        record.update(self._rates())
        record.update(state.extras)
        state.extras.clear()
        self.start()
        return record

    def _progress(self) -> dict[str, int]:
        state = self.state
        return {
            "progress/global_step": state.step,
            "progress/consumed_samples": state.consumed_samples,
            "progress/consumed_tokens": state.consumed_tokens,
        }

    def _rates(self) -> dict[str, float]:
        world = self.state.world
        seconds = max(time.perf_counter() - self._began, 1e-9)
        rates = {
            "perf/tokens_per_s": self._tokens / seconds,
            "perf/step_time_s": seconds / max(self._steps, 1),
            "perf/data_wait_frac": (self.state.loader.wait_s - self._waited) / seconds,
        }
        if world.device.type == "cuda":
            per_gpu = rates["perf/tokens_per_s"] / world.world_size
            rates["perf/tokens_per_s_per_gpu"] = per_gpu
            rates["perf/tflops_per_gpu"] = per_gpu * self._flops / 1e12
            if self._peak is not None:
                rates["perf/mfu"] = per_gpu * self._flops / self._peak
            rates["memory/allocated_gib"] = torch.cuda.max_memory_allocated(world.device) / 2**30
            rates["memory/reserved_gib"] = torch.cuda.max_memory_reserved(world.device) / 2**30
        return rates

    def evaluate(self, forward: Forward, data: Prepared) -> dict[str, float | int] | None:
        """Evaluate on samples spread evenly over the validation set, split over the ranks; None if there is none."""
        if data.validation is None:
            return None
        state, world = self.state, self.state.world
        shape = world.mesh.shape
        sizes = None if data.token_bytes is None else torch.as_tensor(data.token_bytes)
        total, weight, size = torch.zeros((), dtype=torch.float64, device=world.device), 0, 0
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)  # the steps before are the training's time
        paused = time.perf_counter()
        state.model.eval()
        with torch.no_grad():
            for batch in evaluation_batches(
                data.validation,
                world.recipe.training.eval_samples,
                world.batch.micro_batch_size,
                shape.batch_index(world.rank),
                shape.batch_degree,
                device=world.device,
            ):
                total += forward(batch)
                weight += batch.weight
                if sizes is not None:
                    labels = batch.labels[batch.labels >= 0]
                    size += int(sizes.to(labels.device)[labels].sum())
        state.model.train()
        loss, tokens, bytes_ = global_sums(world, total, float(weight), float(size))
        self._began += time.perf_counter() - paused
        record: dict[str, float | int] = dict(self._progress())
        mean = loss / max(tokens, 1.0)
        record["eval/loss"] = mean
        record["eval/perplexity"] = math.exp(mean) if mean < 700 else math.inf
        if bytes_:
            record["eval/bits_per_byte"] = loss / math.log(2) / bytes_
        return record
