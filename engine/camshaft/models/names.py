"""Names of the modules of the built-in decoder, by arithmetic: importing this imports no torch.

What a recipe says of modules can be checked against them before anything is built.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from camshaft.models.config import ModelConfig
from camshaft.models.shapes import parameter_shapes

_FIRST, _LAYERS = ("model", "model.embed_tokens", "model.rotary_emb", "model.layers"), "model.layers"
_LAST = ("model.norm", "lm_head", "loss")


@lru_cache(maxsize=4)
def module_names(config: ModelConfig) -> tuple[str, ...]:
    """Every module inside of ``camshaft.models.llama.Llama``, in the order of its ``named_modules``."""
    layers = (name for index in range(config.num_hidden_layers) for name in _layer(f"{_LAYERS}.{index}", config))
    return (*_FIRST, *layers, *_LAST)


def _layer(name: str, config: ModelConfig) -> Iterator[str]:
    norms = ("q_norm", "k_norm") if config.qk_norm else ()
    yield from (name, f"{name}.input_layernorm", f"{name}.self_attn")
    yield from (f"{name}.self_attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj", "o_proj", *norms))
    yield from (f"{name}.post_attention_layernorm", f"{name}.mlp")
    yield from (f"{name}.mlp.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj"))


@lru_cache(maxsize=4)
def called_names(config: ModelConfig) -> tuple[str, ...]:
    """Those modules that run in a forward: all but the list of the layers."""
    return tuple(name for name in module_names(config) if name != _LAYERS)


@lru_cache(maxsize=4)
def parameter_names(config: ModelConfig) -> tuple[str, ...]:
    """Every parameter under all of its names, in the order of ``named_parameters`` without removing duplicates."""
    shapes = parameter_shapes(config)
    return (*(each.name for each in shapes), *(name for each in shapes for name in each.tied))
