"""Names and shapes of the parameters of the built-in decoder, by arithmetic: importing this imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from camshaft.boxes import Box
from camshaft.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class ParameterShape:
    """One parameter under its first name. ``tied``: its other names in the model, if it has any.

    ``layer``: which layer it is of; -1 for what comes before the first one (the embedding), and the number of layers
    for what comes after the last (norm and head). Where axes divide the model, ``camshaft plan`` asks plugins what a
    rank has of it: ``shape`` is then the rank's own, ``box`` the rectangle of the whole that it is, and ``stage`` the
    pipeline stage that computes with it. ``owned``: False for a copy that is no parameter here, because a rank of
    another stage updates it.
    """

    name: str
    shape: tuple[int, ...]
    trains: bool = True
    tied: tuple[str, ...] = ()
    layer: int = -1
    stage: int = 0
    owned: bool = True
    box: Box | None = None

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """Shape of the parameter as one process would have it."""
        return self.shape if self.box is None else self.box.shape

    @property
    def copies(self) -> int:
        """How many ranks along axes that divide parameters have the same elements."""
        return 1 if self.box is None else self.box.copies


def parameter_shapes(config: ModelConfig) -> list[ParameterShape]:
    """Every parameter of ``camshaft.models.llama.Llama`` once, in the order of its ``named_parameters``."""
    table, head, layers = "model.embed_tokens.weight", "lm_head.weight", config.num_hidden_layers
    vocabulary = (config.vocab_size, config.hidden_size)
    found = [ParameterShape(table, vocabulary, tied=(head,) if config.tie_word_embeddings else ())]
    for index in range(layers):
        found += [ParameterShape(f"model.layers.{index}.{name}", shape, layer=index) for name, shape in _layer(config)]
    found.append(ParameterShape("model.norm.weight", (config.hidden_size,), layer=layers))
    return found if config.tie_word_embeddings else [*found, ParameterShape(head, vocabulary, layer=layers)]


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
