"""Torch's tensor parallel by hand: ``parallelize_module`` over the same model, with and without sequence parallel."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn import Module

from camshaft.data.loader import Batch
from tools.bench.peers import Bare
from tools.bench.setup import MAX_NORM, plain_optimizer


def plan(layers: int, sequence: bool) -> dict[str, ParallelStyle]:
    """Styles by module, as torch's tutorial of tensor parallel for Llama gives them; logits stay divided."""
    between = Shard(1) if sequence else Replicate()
    found: dict[str, ParallelStyle] = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        "lm_head": ColwiseParallel(input_layouts=between, output_layouts=Shard(-1), use_local_output=False),
    }
    inner = {name: ColwiseParallel() for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")}
    inner |= {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel()}
    for index in range(layers):
        at = f"model.layers.{index}."
        found |= {at + name: style for name, style in inner.items()}
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            found[at + name] = RowwiseParallel(output_layouts=between)
        if sequence:
            found[at + "input_layernorm"] = found[at + "post_attention_layernorm"] = SequenceParallel()
            found[at + "self_attn"] = PrepareModuleInput(
                input_layouts=(Shard(1), None, None), desired_input_layouts=(Replicate(), None, None)
            )
            found[at + "mlp"] = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    if sequence:
        found["model.norm"] = SequenceParallel()
    return found


def sum_before_norms(block: Any) -> None:
    """Let a block add to the residual stream outside of its norms: torch's styles know modules of one tensor alone."""

    def forward(hidden: Tensor, rope: Any, mask: Any) -> Tensor:
        hidden = hidden + block.self_attn(block.input_layernorm(hidden), rope, mask)
        summed: Tensor = hidden + block.mlp(block.post_attention_layernorm(hidden))
        return summed

    block.forward = forward


class Parallelized(Bare):
    """``parallelize_module``, ``loss_parallel``, and a norm over local shards that counts each parameter once."""

    sequence = False

    def build(self, model: Module) -> tuple[Module, torch.optim.Optimizer]:
        """Divide the model along all ranks."""
        mesh: DeviceMesh = init_device_mesh("cpu", (self.job.world_size,))
        layers = model.config.num_hidden_layers  # type: ignore[union-attr]
        for block in model.model.layers:  # type: ignore[union-attr]
            sum_before_norms(block)
        divided = parallelize_module(model, mesh, plan(int(layers), self.sequence))  # type: ignore[arg-type]
        return divided, plain_optimizer(divided)

    def forward(self, batch: Batch) -> Tensor:
        """Sum of the token losses; logits stay divided by vocabulary."""
        with loss_parallel():
            return super().forward(batch)

    def backward(self, loss: Tensor) -> None:
        """The context is needed here, too."""
        with loss_parallel():
            loss.backward()  # type: ignore[no-untyped-call]

    def finish(self) -> None:
        """Clip by the norm over all shards, and step."""
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        divided = [each for each in gradients if isinstance(each, DTensor) and each.placements[0].is_shard()]
        others = [each for each in gradients if not (isinstance(each, DTensor) and each.placements[0].is_shard())]
        square = _norm(divided).square()
        dist.all_reduce(square)
        norm = (square + _norm(others).square()).sqrt()
        factor = (MAX_NORM / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([_local(each) for each in gradients], factor)
        self.optimizer.step()
        self.optimizer.zero_grad()


class SequenceParallelized(Parallelized):
    """The same with norms on parts of the sequence."""

    sequence = True


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _norm(tensors: list[Any]) -> Tensor:
    return torch.nn.utils.get_total_norm([_local(each) for each in tensors])
