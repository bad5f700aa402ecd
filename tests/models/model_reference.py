"""A decoder written out with loops, sharing no code with the engine, and what the tests of models have in common."""

from __future__ import annotations

import math

import torch

from camshaft.data.loader import Batch
from camshaft.models.config import ModelConfig, RopeScaling
from camshaft.models.init import materialize
from camshaft.models.llama import Llama
from camshaft.ops import Ops

LLAMA3 = RopeScaling(8.0, 1.0, 4.0, 64)

SHAPES = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "grouped by three": {"num_key_value_heads": 2},
    "grouped by two": {"num_key_value_heads": 3},
    "multi-query": {"num_key_value_heads": 1, "rms_norm_eps": 1e-3},
    "wide heads": {"head_dim": 10},
    "narrow heads": {"head_dim": 2, "num_key_value_heads": 3},
    "qwen2": {"attention_bias": True, "num_key_value_heads": 2, "rope_theta": 1e6, "tie_word_embeddings": True},
    "qwen3": {"qk_norm": True, "head_dim": 8, "num_key_value_heads": 3},
    "llama 3.1": {"rope_scaling": LLAMA3, "rope_theta": 500.0, "head_dim": 12, "num_key_value_heads": 2},
}
"""Odd sizes on purpose: 97 tokens, 6 heads, width 24, 50 inside the MLP, 3 layers."""


def odd(**changes) -> ModelConfig:
    fields = {
        "vocab_size": 97, "hidden_size": 24, "intermediate_size": 50, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 6, "head_dim": 4, "max_position_embeddings": 64, "initializer_range": 0.3,
    }  # fmt: skip
    return ModelConfig(**(fields | changes))


def built(config: ModelConfig, dtype: torch.dtype = torch.float64, seed: int = 3, ops: Ops | None = None) -> Llama:
    """On the CPU, with norms and biases away from 1 and 0, so that leaving one out shows."""
    with torch.device("meta"):
        model = Llama(config, ops)
    materialize(model, seed=seed, device="cpu", dtype=dtype)
    noise = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=noise, dtype=torch.float64) * 0.2)
            assert parameter.dtype is dtype, name
    return model


def batch(config: ModelConfig, rows: int = 2, length: int = 11, seed: int = 5) -> Batch:
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (rows, length + 1), generator=random)
    labels = tokens[:, 1:].clone()
    labels[0, 3] = labels[-1, 0] = -100
    return Batch(
        tokens=tokens[:, :-1].contiguous(),
        labels=labels,
        positions=torch.arange(length).expand(rows, length).contiguous(),
        document=None,
        weight=int((labels != -100).sum()),
    )


def packed(config: ModelConfig) -> Batch:
    """Two rows of documents of uneven lengths; the second row ends with padding."""
    made = batch(config, rows=2, length=14)
    lengths = ((5, 1, 8), (3, 7, 4))
    made.positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    made.document = torch.stack(
        [torch.cat([torch.full((n,), index, dtype=torch.int32) for index, n in enumerate(row)]) for row in lengths]
    )
    ends = made.positions.roll(-1, 1) == 0
    made.labels = made.labels.masked_fill(ends, -100)
    made.labels[1, 10:] = -100
    return made


def reference_loss(state: dict[str, torch.Tensor], config: ModelConfig, data: Batch) -> torch.Tensor:
    """Sum of token losses from Hugging Face names; one row, head, token and pair at a time."""
    head = state.get("lm_head.weight", state["model.embed_tokens.weight"])
    total = torch.zeros((), dtype=torch.float64)
    for row in range(data.tokens.shape[0]):
        document = None if data.document is None else data.document[row].tolist()
        hidden = _decode(state, config, data.tokens[row].tolist(), data.positions[row].tolist(), document)
        for place, label in enumerate(data.labels[row].tolist()):
            if label != -100:
                logits = head @ hidden[place]
                total = total + logits.exp().sum().log() - logits[label]
    return total


def _decode(state, config, tokens, positions, document):
    hidden = [state["model.embed_tokens.weight"][token] for token in tokens]
    for layer in range(config.num_hidden_layers):
        weights = {name[len(f"model.layers.{layer}.") :]: value for name, value in state.items()
                   if name.startswith(f"model.layers.{layer}.")}  # fmt: skip
        normed = [_norm(token, weights["input_layernorm.weight"], config) for token in hidden]
        mixed = _attention(weights, config, normed, positions, document)
        hidden = [token + more for token, more in zip(hidden, mixed, strict=True)]
        for place, token in enumerate(hidden):
            normed_token = _norm(token, weights["post_attention_layernorm.weight"], config)
            gate = weights["mlp.gate_proj.weight"] @ normed_token
            up = weights["mlp.up_proj.weight"] @ normed_token
            hidden[place] = token + weights["mlp.down_proj.weight"] @ (gate / (1 + (-gate).exp()) * up)
    return [_norm(token, state["model.norm.weight"], config) for token in hidden]


def _norm(token, weight, config):
    return token / ((token * token).sum() / len(token) + config.rms_norm_eps).sqrt() * weight


def _attention(weights, config, tokens, positions, document):
    def project(kind, token):
        out = weights[f"self_attn.{kind}_proj.weight"] @ token
        return out + weights[f"self_attn.{kind}_proj.bias"] if config.attention_bias else out

    def heads(kind, token, position):
        out = project(kind, token).split(config.head_dim)
        if config.qk_norm:
            out = [_norm(head, weights[f"self_attn.{kind}_norm.weight"], config) for head in out]
        return [turned(head, position, config) for head in out]

    queries = [heads("q", token, position) for token, position in zip(tokens, positions, strict=True)]
    keys = [heads("k", token, position) for token, position in zip(tokens, positions, strict=True)]
    values = [project("v", token).split(config.head_dim) for token in tokens]
    group = config.num_attention_heads // config.num_key_value_heads
    out = []
    for place in range(len(tokens)):
        seen = [at for at in range(place + 1) if document is None or document[at] == document[place]]
        mixed = []
        for head in range(config.num_attention_heads):
            query, shared = queries[place][head], head // group
            scores = [(query * keys[at][shared]).sum() / math.sqrt(config.head_dim) for at in seen]
            weight = [score.exp() for score in scores]
            share = sum(weight)
            mixed.append(sum(w / share * values[at][shared] for w, at in zip(weight, seen, strict=True)))
        out.append(weights["self_attn.o_proj.weight"] @ torch.cat(mixed))
    return out


def turned(head, position, config):
    """Hugging Face's layout: element i is paired with element i + head_dim / 2."""
    half = config.head_dim // 2
    first, second = [], []
    for pair in range(half):
        angle = position * frequency(config, pair)
        cos, sin = math.cos(angle), math.sin(angle)
        first.append(head[pair] * cos - head[pair + half] * sin)
        second.append(head[pair + half] * cos + head[pair] * sin)
    return torch.stack(first + second)


def frequency(config, pair):
    plain = config.rope_theta ** (-2 * pair / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    wavelength = 2 * math.pi / plain
    if wavelength > scaling.original_max_position_embeddings / scaling.low_freq_factor:
        return plain / scaling.factor
    if wavelength < scaling.original_max_position_embeddings / scaling.high_freq_factor:
        return plain
    smooth = (scaling.original_max_position_embeddings / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    return (1 - smooth) * plain / scaling.factor + smooth * plain
