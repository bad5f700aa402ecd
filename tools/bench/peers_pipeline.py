"""Torch's pipelines: ``torch.distributed.pipelining`` over the same stages, and the clipping that it leaves open."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, schedules

from camshaft.data.loader import Window
from camshaft.models.init import materialize
from camshaft.models.llama import Llama, TokenLoss
from camshaft.recipe import check
from tools.bench.peers import Job
from tools.bench.setup import MAX_NORM, plain_loader, plain_optimizer

Span = tuple[int, int]
"""First layer of a stage, and the one after its last."""


SCHEDULES: dict[str, tuple[str, bool]] = {
    "gpipe": ("ScheduleGPipe", False),
    "1f1b": ("Schedule1F1B", False),
    "interleaved_1f1b": ("ScheduleInterleaved1F1B", True),
    "zbv": ("ScheduleZBVZeroBubble", True),
    "zb_h1": ("ScheduleInterleavedZeroBubble", True),
    "dualpipe_v": ("ScheduleDualPipeV", True),
}
"""Our name to torch's class, and whether it takes several stages a rank."""


class Stage(nn.Module):
    """Layers of a decoder, after its table in the first stage, before its last norm and head in the last."""

    def __init__(self, model: Llama, span: Span, layers: int) -> None:
        super().__init__()
        begin, end = span
        self.table = model.model.embed_tokens if begin == 0 else None
        self.layers = nn.ModuleList(model.model.layers[begin:end])
        self.norm = model.model.norm if end == layers else None
        self.head = model.lm_head if end == layers else None
        self.angles = model.model.rotary_emb

    def forward(self, given: Tensor) -> Tensor:
        """Hidden states [b, s, hidden_size] of tokens [b, s] or hidden states; logits from the last stage."""
        hidden = given if self.table is None else self.table(given)
        rope = self.angles(torch.arange(given.shape[1]).expand(given.shape[:2]), torch.float32)
        for layer in self.layers:
            hidden = layer(hidden, rope, None)
        return hidden if self.norm is None or self.head is None else self.head(self.norm(hidden))


def decoder_stages(job: Job, spans: Sequence[Span], own: Sequence[int]) -> nn.ModuleList:
    """The stages of one rank, with the first values that the whole model would have; no other values are made."""
    config = check(job.resolved, None).require().config
    assert config is not None
    layers = config.num_hidden_layers
    with torch.device("meta"):
        model = Llama(config)
        stages = nn.ModuleList(Stage(model, spans[index], layers) for index in own)
    for layer in range(layers):
        if not any(begin <= layer < end for begin, end in (spans[index] for index in own)):
            delattr(model.model.layers, str(layer))
    if 0 not in own:
        del model.model.embed_tokens
    if len(spans) - 1 not in own:
        del model.model.norm, model.lm_head
    materialize(model, seed=job.resolved.recipe.seed, device=torch.device("cpu"), dtype=torch.float32)
    return stages


class TorchPipeline:
    """One rank of a schedule of torch's over ``stages``, which are number ``own`` of ``count``, in fp32."""

    def __init__(self, job: Job, schedule: str, stages: nn.ModuleList, own: Sequence[int], count: int) -> None:
        theirs, multiple = SCHEDULES[schedule]
        self._stages, self._optimizer = stages, plain_optimizer(stages)
        wrapped = [
            PipelineStage(stage, index, count, torch.device("cpu")) for index, stage in zip(own, stages, strict=True)
        ]
        self._first, self._last = 0 in own, count - 1 in own
        make: Callable[..., Any] = getattr(schedules, theirs)
        self._schedule = make(
            wrapped if multiple else wrapped[0], job.case.accumulation, loss_fn=self.loss, scale_grads=False
        )
        self._loader = plain_loader(job.resolved, job.rank, job.world_size)
        self._token_loss, self.weight = TokenLoss(), 1

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Of a microbatch, divided by the ``weight`` of the window."""
        found: Tensor = self._token_loss(logits, labels) / self.weight
        return found

    def steps(self, count: int) -> float:
        """Run ``count`` windows; returns the last loss of the window per token, 0 where another rank makes it."""
        total = 0.0
        for _ in range(count):
            window = self._loader.next()
            assert isinstance(window, Window)
            self.weight = window.weight
            tokens = [torch.cat([batch.tokens for batch in window.batches])] if self._first else []
            target = torch.cat([batch.labels for batch in window.batches]) if self._last else None
            losses: list[Tensor] = []
            self._schedule.step(*tokens, target=target, losses=losses, return_outputs=False)
            self._finish()
            total = float(torch.stack(losses).detach().sum()) if self._last else 0.0
        return total

    def _finish(self) -> None:
        """Clip by the norm over all stages, and step."""
        parameters = list(self._stages.parameters())
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        square = torch.nn.utils.get_total_norm(gradients).square()
        dist.all_reduce(square)
        torch.nn.utils.clip_grads_with_norm_(parameters, MAX_NORM, square.sqrt())
        self._optimizer.step()
        self._optimizer.zero_grad()

    def close(self) -> None:
        """Stop the loader's thread."""
        self._loader.close()
