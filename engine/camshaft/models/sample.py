"""Text from a model: plain sampling without a cache, for a look at what was learned."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from camshaft.models.llama import Llama


@torch.no_grad()
def generate(
    model: Llama,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    context: int | None = None,
    stop: int | None = None,
) -> list[int]:
    """Continue ``prompt`` and return it with the new token ids.

    Every token costs a forward over at most ``context`` tokens (default: the model's ``max_position_embeddings``).
    Draws are made on the CPU, so that a seeded CPU ``generator`` gives the same text for the same logits on any device.

    Args:
        model: any mode; left as it was.
        prompt: at least one token id.
        max_new_tokens: how many to add.
        temperature: 0 takes the likeliest token.
        top_k: draw among so many of the likeliest; all without it.
        generator: on the CPU; torch's default one without it.
        context: how many of the last tokens the model sees.
        stop: end after this token id.

    Raises:
        ValueError: the prompt is empty, or an argument is out of range.
    """
    if not prompt or temperature < 0 or (top_k is not None and top_k < 1):
        raise ValueError("generate needs a prompt of at least one token, temperature >= 0 and top_k >= 1")
    tokens, limit = list(prompt), context or model.config.max_position_embeddings
    device, training = next(model.parameters()).device, model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            seen = torch.tensor([tokens[-limit:]], dtype=torch.int64, device=device)
            tokens.append(_draw(model.logits(seen)[0, -1], temperature, top_k, generator))
            if tokens[-1] == stop:
                break
    finally:
        model.train(training)
    return tokens


def _draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> int:
    """One token id from ``logits`` [vocabulary]."""
    logits = logits.cpu()
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < logits.numel():
        best, ids = logits.topk(top_k)
    else:
        best, ids = logits, torch.arange(logits.numel())
    weights = torch.softmax(best / temperature, -1)
    return int(ids[torch.multinomial(weights, 1, generator=generator)])
