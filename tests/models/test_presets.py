from __future__ import annotations

import time

import pytest
import torch

from camshaft.models.config import resolve
from camshaft.models.llama import Llama
from camshaft.models.presets import PRESETS
from camshaft.recipe.schema import Model

PUBLISHED = {
    # Source, for all: `safetensors.total` on the model's page on Hugging Face (meta-llama/..., Qwen/...), and what that
    # file holds besides the parameters. Llama 2's files store `inv_freq`, 64 values a layer; the two smallest Qwen3
    # store the tied table twice. KerasHub's presets state the same counts for Qwen2.5 0.5B, 3B, 32B, 72B and all Qwen3.
    "llama-2-7b": (6_738_417_664, 32 * 64),
    "llama-2-13b": (13_015_866_880, 40 * 64),
    "llama-2-70b": (68_976_653_312, 80 * 64),
    "llama-3-8b": (8_030_261_248, 0),
    "llama-3-70b": (70_553_706_496, 0),
    "llama-3.1-8b": (8_030_261_248, 0),
    "llama-3.1-70b": (70_553_706_496, 0),
    "llama-3.1-405b": (405_853_388_800, 0),
    "llama-3.2-1b": (1_235_814_400, 0),
    "llama-3.2-3b": (3_212_749_824, 0),
    "qwen2-0.5b": (494_032_768, 0),
    "qwen2-1.5b": (1_543_714_304, 0),
    "qwen2-7b": (7_615_616_512, 0),
    "qwen2-72b": (72_706_203_648, 0),
    "qwen2.5-0.5b": (494_032_768, 0),
    "qwen2.5-1.5b": (1_543_714_304, 0),
    "qwen2.5-3b": (3_085_938_688, 0),
    "qwen2.5-7b": (7_615_616_512, 0),
    "qwen2.5-14b": (14_770_033_664, 0),
    "qwen2.5-32b": (32_763_876_352, 0),
    "qwen2.5-72b": (72_706_203_648, 0),
    "qwen3-0.6b": (751_632_384, 151_936 * 1024),
    "qwen3-1.7b": (2_031_739_904, 151_936 * 2048),
    "qwen3-4b": (4_022_468_096, 0),
    "qwen3-8b": (8_190_735_360, 0),
    "qwen3-14b": (14_768_307_200, 0),
    "qwen3-32b": (32_762_123_264, 0),
}

OWN = {
    # Ours, with the vocabulary that their text names.
    "llama-nano": (1024, 164_160),
    "llama-tiny": (1024, 918_656),
    "llama-small": (12_288, 29_893_120),
    "llama-125m": (50_304, 123_587_328),
    "llama-350m": (50_304, 353_944_576),
    "llama-1b": (32_000, 1_038_682_112),
}


def config_of(preset):
    return resolve(Model(preset=preset), OWN[preset][0] if preset in OWN else None)


def test_every_preset_is_in_one_of_the_tables():
    assert set(PRESETS) == set(PUBLISHED) | set(OWN)


@pytest.mark.parametrize("preset", PRESETS)
def test_parameter_count(preset):
    config = config_of(preset)
    if preset in PUBLISHED:
        total, besides = PUBLISHED[preset]
        wanted = total - besides
    else:
        wanted = OWN[preset][1]
    with torch.device("meta"):
        model = Llama(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == wanted
    assert config.num_parameters() == wanted
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def test_the_counts_that_are_quoted_most():
    assert config_of("llama-2-7b").num_parameters() == 6_738_415_616
    assert config_of("llama-3-8b").num_parameters() == 8_030_261_248
    assert config_of("llama-3-70b").num_parameters() == 70_553_706_496


def test_the_largest_builds_fast():
    config = config_of("llama-3.1-405b")
    start = time.perf_counter()
    with torch.device("meta"):
        Llama(config)
    assert time.perf_counter() - start < 5.0


def test_llama_tiny_is_the_quickstart_model():
    config = config_of("llama-tiny")
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (4, 128, 4)
    assert (config.num_key_value_heads, config.max_position_embeddings) == (2, 512)
    assert config.tie_word_embeddings and config.vocab_size == 1024


def test_every_preset_can_be_changed_by_one_field():
    changed = resolve(Model(preset="llama-3.1-405b", num_hidden_layers=2), None)
    assert changed.num_hidden_layers == 2 and changed.hidden_size == 16_384 and changed.rope_scaling is not None
