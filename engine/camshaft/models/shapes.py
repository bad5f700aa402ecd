"""Names and shapes of the parameters of the built-in decoder, by arithmetic: importing this imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from camshaft.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class ParameterShape:
    """One parameter under its first name. ``tied``: its other names in the model, if it has any."""

    name: str
    shape: tuple[int, ...]
    trains: bool = True
    tied: tuple[str, ...] = ()

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def parameter_shapes(config: ModelConfig) -> list[ParameterShape]:
    """Every parameter of ``camshaft.models.llama.Llama`` once, in the order of its ``named_parameters``."""
    table, head = "model.embed_tokens.weight", "lm_head.weight"
    vocabulary = (config.vocab_size, config.hidden_size)
    found = [ParameterShape(table, vocabulary, tied=(head,) if config.tie_word_embeddings else ())]
    for index in range(config.num_hidden_layers):
        found += [ParameterShape(f"model.layers.{index}.{name}", shape) for name, shape in _layer(config)]
    found.append(ParameterShape("model.norm.weight", (config.hidden_size,)))
    return found if config.tie_word_embeddings else [*found, ParameterShape(head, vocabulary)]


def _layer(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    yield "input_layernorm.weight", (hidden,)
    for name, width in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        yield f"self_attn.{name}.weight", (width, hidden)
        if config.attention_bias:
            yield f"self_attn.{name}.bias", (width,)
    yield "self_attn.o_proj.weight", (hidden, queries)
    if config.qk_norm:
        yield "self_attn.q_norm.weight", (config.head_dim,)
        yield "self_attn.k_norm.weight", (config.head_dim,)
    yield "post_attention_layernorm.weight", (hidden,)
    yield "mlp.gate_proj.weight", (inner, hidden)
    yield "mlp.up_proj.weight", (inner, hidden)
    yield "mlp.down_proj.weight", (hidden, inner)
