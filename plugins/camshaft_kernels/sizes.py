"""What an operation gets in a run: its dtype, how many elements, on which device. By these ``auto`` reads a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from camshaft.models.config import ModelConfig
    from camshaft.state import World

NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
STREAM = ("rms_norm", "layer_norm")
"""Operations on the residual stream, which is as wide as the parameters under autocast."""
UPDATES = ("adamw", "lamb", "grad_norm")
"""Operations on what is updated."""


def dtype_of(op: str, world: World) -> str:
    """Dtype of what ``op`` gets."""
    policy = world.policy
    if op in UPDATES:
        return NAMES[policy.master]
    if op in STREAM:
        return NAMES[torch.promote_types(policy.param, policy.compute)]
    return NAMES[policy.compute]


def device_of(device: torch.device) -> str:
    """``cpu``, or ``cuda`` with its compute capability: what a table is for."""
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda:{major}.{minor}"


def elements(op: str, world: World, config: ModelConfig) -> int:
    """Elements of the largest tensor that ``op`` works on, on one rank, for a microbatch; 1 where nobody knows.

    Of attention it is the scores.
    """
    recipe, mesh = world.recipe, world.mesh
    tokens = world.batch.micro_batch_size * recipe.data.sequence_length
    heads = config.num_attention_heads * config.head_dim
    scores = tokens * recipe.data.sequence_length * config.num_attention_heads
    counts = {
        "rms_norm": tokens * config.hidden_size,
        "layer_norm": tokens * config.hidden_size,
        "rope": tokens * heads // mesh.degree("tp"),
        "attention": scores // mesh.degree("tp"),
        "document_attention": scores // mesh.degree("tp"),
        "swiglu": tokens * config.intermediate_size // mesh.degree("tp"),
        "cross_entropy": tokens * config.vocab_size,
        "linear_cross_entropy": tokens * config.vocab_size,
        **dict.fromkeys(UPDATES, config.num_parameters() // (mesh.degree("tp") * mesh.degree("pp"))),
    }
    return max(counts.get(op, 1), 1)
