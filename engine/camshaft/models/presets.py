"""Shipped architectures, by name.

The shapes of published models are those of the ``config.json`` that their authors published on Hugging Face under
``meta-llama/Llama-2-*-hf``, ``meta-llama/Meta-Llama-3-*``, ``meta-llama/Llama-3.1-*``, ``meta-llama/Llama-3.2-*``,
``Qwen/Qwen2-*``, ``Qwen/Qwen2.5-*`` (the base models) and ``Qwen/Qwen3-*``. ``tests/models/test_presets.py`` holds
their published parameter counts. A preset without ``vocab_size`` takes the tokenizer's.

Importing this imports no torch.
"""

from __future__ import annotations

from typing import Any

from camshaft.recipe.schema import Model


def _shape(hidden: int, intermediate: int, layers: int, heads: int, groups: int, **rest: Any) -> Model:
    """``heads`` query heads share ``groups`` key/value heads."""
    return Model(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        **rest,
    )


def _llama3_scaling(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


_SMALL: dict[str, Any] = {"tie_word_embeddings": True, "max_position_embeddings": 2048}
_LLAMA2: dict[str, Any] = {"vocab_size": 32_000, "max_position_embeddings": 4096}
_LLAMA3: dict[str, Any] = {"vocab_size": 128_256, "max_position_embeddings": 8192, "rope_theta": 500_000.0}
_LLAMA31: dict[str, Any] = {**_LLAMA3, "max_position_embeddings": 131_072, "rope_scaling": _llama3_scaling(8.0)}
_LLAMA32: dict[str, Any] = {**_LLAMA31, "rope_scaling": _llama3_scaling(32.0), "tie_word_embeddings": True}
_QWEN: dict[str, Any] = {"vocab_size": 151_936, "rope_theta": 1_000_000.0, "rms_norm_eps": 1e-6}
_QWEN2: dict[str, Any] = {**_QWEN, "max_position_embeddings": 131_072, "attention_bias": True}
_QWEN2_TIED: dict[str, Any] = {**_QWEN2, "tie_word_embeddings": True}
_QWEN2_LARGE: dict[str, Any] = {**_QWEN2, "vocab_size": 152_064}
_QWEN25_TIED: dict[str, Any] = {**_QWEN2_TIED, "max_position_embeddings": 32_768}
_QWEN25_LARGE: dict[str, Any] = {**_QWEN2_LARGE, "rms_norm_eps": 1e-5}
_QWEN3: dict[str, Any] = {**_QWEN, "max_position_embeddings": 40_960, "head_dim": 128, "qk_norm": True}
_QWEN3_TIED: dict[str, Any] = {**_QWEN3, "tie_word_embeddings": True}

PRESETS: dict[str, Model] = {
    # Open vocabulary, tied: for tests, benches and first runs.
    "llama-nano": _shape(64, 192, 2, 4, 2, tie_word_embeddings=True, max_position_embeddings=512),
    "llama-tiny": _shape(128, 384, 4, 4, 2, tie_word_embeddings=True, max_position_embeddings=512),
    "llama-small": _shape(512, 1408, 8, 8, 4, **_SMALL),
    "llama-125m": _shape(768, 2048, 12, 12, 12, **_SMALL),
    "llama-350m": _shape(1024, 2736, 24, 16, 16, **_SMALL),
    "llama-1b": _shape(2048, 8192, 16, 32, 8, **_SMALL),
    "llama-2-7b": _shape(4096, 11_008, 32, 32, 32, **_LLAMA2),
    "llama-2-13b": _shape(5120, 13_824, 40, 40, 40, **_LLAMA2),
    "llama-2-70b": _shape(8192, 28_672, 80, 64, 8, **_LLAMA2),
    "llama-3-8b": _shape(4096, 14_336, 32, 32, 8, **_LLAMA3),
    "llama-3-70b": _shape(8192, 28_672, 80, 64, 8, **_LLAMA3),
    "llama-3.1-8b": _shape(4096, 14_336, 32, 32, 8, **_LLAMA31),
    "llama-3.1-70b": _shape(8192, 28_672, 80, 64, 8, **_LLAMA31),
    "llama-3.1-405b": _shape(16_384, 53_248, 126, 128, 8, **_LLAMA31),
    "llama-3.2-1b": _shape(2048, 8192, 16, 32, 8, **_LLAMA32),
    "llama-3.2-3b": _shape(3072, 8192, 28, 24, 8, **_LLAMA32),
    "qwen2-0.5b": _shape(896, 4864, 24, 14, 2, **_QWEN2_TIED),
    "qwen2-1.5b": _shape(1536, 8960, 28, 12, 2, **_QWEN2_TIED),
    "qwen2-7b": _shape(3584, 18_944, 28, 28, 4, **_QWEN2_LARGE),
    "qwen2-72b": _shape(8192, 29_568, 80, 64, 8, **_QWEN25_LARGE),
    "qwen2.5-0.5b": _shape(896, 4864, 24, 14, 2, **_QWEN25_TIED),
    "qwen2.5-1.5b": _shape(1536, 8960, 28, 12, 2, **_QWEN25_TIED),
    "qwen2.5-3b": _shape(2048, 11_008, 36, 16, 2, **_QWEN25_TIED),
    "qwen2.5-7b": _shape(3584, 18_944, 28, 28, 4, **_QWEN2_LARGE),
    "qwen2.5-14b": _shape(5120, 13_824, 48, 40, 8, **_QWEN25_LARGE),
    "qwen2.5-32b": _shape(5120, 27_648, 64, 40, 8, **_QWEN25_LARGE),
    "qwen2.5-72b": _shape(8192, 29_568, 80, 64, 8, **_QWEN25_LARGE),
    "qwen3-0.6b": _shape(1024, 3072, 28, 16, 8, **_QWEN3_TIED),
    "qwen3-1.7b": _shape(2048, 6144, 28, 16, 8, **_QWEN3_TIED),
    "qwen3-4b": _shape(2560, 9728, 36, 32, 8, **_QWEN3_TIED),
    "qwen3-8b": _shape(4096, 12_288, 36, 32, 8, **_QWEN3),
    "qwen3-14b": _shape(5120, 17_408, 40, 40, 8, **_QWEN3),
    "qwen3-32b": _shape(5120, 25_600, 64, 64, 8, **_QWEN3),
}
"""Name to architecture, as a recipe's ``model`` section would give it."""
