from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
from model_reference import SHAPES, batch, built, odd
from torch.utils.flop_counter import FlopCounterMode

from camshaft.errors import RecipeError
from camshaft.models.config import RopeScaling, resolve
from camshaft.recipe.schema import Model

WIDE = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6,
    "max_position_embeddings": 128,
}  # fmt: skip
BLOCK = {
    "rope_type": "llama3", "factor": 8, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def problems(model, vocab_size=None):
    with pytest.raises(RecipeError) as caught:
        resolve(model, vocab_size)
    assert caught.value.exit_status == 2
    return caught.value.problems


def test_defaults_of_a_model_without_preset():
    config = resolve(Model(**WIDE), 300)
    assert (config.vocab_size, config.num_key_value_heads, config.head_dim) == (300, 6, 8)
    assert (config.rope_theta, config.rms_norm_eps, config.initializer_range) == (10_000.0, 1e-5, 0.02)
    assert not (config.tie_word_embeddings or config.attention_bias or config.qk_norm or config.rope_scaling)


def test_fields_of_the_recipe_win_over_the_preset():
    config = resolve(
        Model(preset="qwen3-0.6b", head_dim=64, tie_word_embeddings=False, vocab_size=200_000, rope_theta=5.0), 1000
    )
    assert (config.head_dim, config.tie_word_embeddings, config.vocab_size) == (64, False, 200_000)
    assert config.rope_theta == 5.0 and config.qk_norm and config.hidden_size == 1024


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"num_attention_heads": 5}, "model.num_attention_heads", "48 is not divisible by 5"),
        ({"num_key_value_heads": 4}, "model.num_key_value_heads", "use one of 1, 2, 3, 6"),
        ({"num_key_value_heads": 12}, "model.num_key_value_heads", "6 heads cannot share 12"),
        ({"head_dim": 7}, "model.head_dim", "7 wide"),
        ({"num_attention_heads": 16}, "model.num_attention_heads", "3 wide"),
        ({"vocab_size": 299}, "model.vocab_size", "299 rows are too few for the tokenizer's 300"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "model.rope_scaling", "'yarn' is not known"),
        ({"rope_scaling": {"factor": 2.0}}, "model.rope_scaling", "rope_type is missing"),
        ({"rope_scaling": BLOCK | {"factor": 0}}, "model.rope_scaling.factor", "positive number, got 0"),
        ({"rope_scaling": BLOCK | {"factor": True}}, "model.rope_scaling.factor", "positive number, got true"),
        ({"rope_scaling": BLOCK | {"factor": "8"}}, "model.rope_scaling.factor", "positive number, got '8'"),
        ({"rope_scaling": BLOCK | {"facter": 8.0}}, "model.rope_scaling.facter", "Did you mean 'factor'"),
        ({"rope_scaling": BLOCK | {"high_freq_factor": 1}}, "model.rope_scaling.high_freq_factor", "above low"),
        (
            {"rope_scaling": BLOCK | {"original_max_position_embeddings": 0.5}},
            "model.rope_scaling.original_max_position_embeddings",
            "got 0.5",
        ),
    ],
)  # fmt: skip
def test_one_fault(changes, key, words):
    (problem,) = problems(Model(**(WIDE | changes)), 300)
    assert problem.key == key
    assert words in str(problem)


def test_every_missing_key_of_rope_scaling_is_named():
    found = problems(Model(**WIDE, rope_scaling={"rope_type": "llama3", "factor": 8.0}), 300)
    assert [problem.key.removeprefix("model.rope_scaling.") for problem in found] == [
        "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    ]  # fmt: skip


def test_all_faults_come_at_once():
    found = problems(
        Model(
            hidden_size=50, num_attention_heads=6, num_key_value_heads=4, vocab_size=5, rope_scaling={"type": "linear"}
        ),
        300,
    )
    assert [problem.key for problem in found] == [
        "model", "model.num_key_value_heads", "model.num_attention_heads", "model.vocab_size", "model.rope_scaling",
    ]  # fmt: skip
    assert "intermediate_size, num_hidden_layers, max_position_embeddings" in str(found[0])


def test_indivisible_heads_are_legal_with_a_head_dim():
    assert resolve(Model(**(WIDE | {"num_attention_heads": 5, "head_dim": 8})), 300).head_dim == 8


@pytest.mark.parametrize("name", ["qwen-3-8b", "Llama-3-8B", "llama3-8b", "qwen3-8"])
def test_an_unknown_preset_is_answered_with_the_nearest(name):
    (problem,) = problems(Model(preset=name), 300)
    assert problem.key == "model.preset" and "Did you mean '" in str(problem)
    assert ("qwen3-8b" if name.startswith("q") else "llama-3-8b") in str(problem)


def test_a_preset_unlike_all_others_is_answered_with_the_list():
    (problem,) = problems(Model(preset="mamba"), 300)
    assert "llama-tiny" in problem.fix and "qwen3-32b" in problem.fix


def test_vocabulary():
    assert resolve(Model(preset="llama-tiny"), 777).vocab_size == 777
    assert resolve(Model(preset="llama-tiny", vocab_size=1024), 777).vocab_size == 1024
    assert resolve(Model(preset="llama-3-8b"), None).vocab_size == 128_256
    (problem,) = problems(Model(preset="llama-tiny"))
    assert problem.key == "model.vocab_size" and "no tokenizer" in str(problem)
    (problem,) = problems(Model(preset="llama-2-7b"), 32_001)
    assert problem.key == "model.vocab_size" and "32001" in str(problem)


def test_rope_scaling_is_read_written_and_switched_off():
    config = resolve(Model(**WIDE, rope_scaling=BLOCK), 300)
    assert config.rope_scaling == RopeScaling(8, 1.0, 4.0, 8192)
    assert config.rope_scaling.as_dict() == BLOCK
    assert resolve(Model(preset="llama-3.2-1b"), None).rope_scaling == RopeScaling(32.0, 1.0, 4.0, 8192)
    assert resolve(Model(preset="llama-3.2-1b", rope_scaling={"rope_type": "default"}), None).rope_scaling is None


def test_a_config_is_frozen_hashable_and_replaceable():
    config = resolve(Model(preset="llama-3.2-1b"), None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 1
    assert hash(config) == hash(dataclasses.replace(config))
    assert dataclasses.replace(config, num_hidden_layers=2).num_hidden_layers == 2


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_closed_form_count_of_odd_shapes(changes):
    config = odd(**changes)
    assert config.num_parameters() == sum(parameter.numel() for parameter in built(config).parameters())


def test_flops_of_llama_3_8b():
    products = 8_030_261_248 - 128_256 * 4096
    assert resolve(Model(preset="llama-3-8b"), None).flops_per_token(8192) == 6 * products + 12 * 32 * 32 * 128 * 8192


@pytest.mark.parametrize("name", ["plain", "tied", "grouped by two", "wide heads"])
def test_flops_are_three_times_those_that_torch_counts_in_a_forward(name):
    config = odd(**SHAPES[name])
    model, data = built(config), batch(config, rows=2, length=16)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(data)
    vectors = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 1)
    counted = 3 * counter.get_total_flops() / data.tokens.numel()
    assert config.flops_per_token(16) == counted + 6 * vectors


def test_importing_the_configuration_imports_no_torch():
    code = "import sys, camshaft.models.config, camshaft.models.presets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
