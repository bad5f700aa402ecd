"""Parameter shapes by arithmetic against the model that is built."""

import dataclasses
import subprocess
import sys

import pytest
import torch

from camshaft.models.config import resolve
from camshaft.models.llama import Llama
from camshaft.models.presets import PRESETS
from camshaft.models.shapes import parameter_shapes
from camshaft.recipe.schema import Model

ODD = {"attention_bias": True, "qk_norm": True, "head_dim": 10, "num_key_value_heads": 1}


def config_of(preset, **changes):
    return dataclasses.replace(resolve(Model(preset=preset), PRESETS[preset].vocab_size or 1024), **changes)


def compare(config):
    with torch.device("meta"):
        model = Llama(config)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    real = [(name, tuple(p.shape), p.requires_grad, names[id(p)][1:]) for name, p in model.named_parameters()]
    found = parameter_shapes(config)
    assert [(each.name, each.shape, each.trains, list(each.tied)) for each in found] == real
    assert sum(each.elements for each in found) == config.num_parameters()


@pytest.mark.parametrize("preset", PRESETS)
def test_names_shapes_order_and_ties_are_the_built_models(preset):
    # The layers are alike: four of them tell all that the number of layers can change.
    config = config_of(preset)
    compare(dataclasses.replace(config, num_hidden_layers=min(config.num_hidden_layers, 4)))
    assert sum(each.elements for each in parameter_shapes(config)) == config.num_parameters()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layers", [1, 12])
def test_biases_head_norms_and_widths_that_differ(tied, layers):
    compare(config_of("llama-tiny", tie_word_embeddings=tied, num_hidden_layers=layers, **ODD))


def test_shapes_need_no_torch():
    code = "import sys, camshaft.models.shapes, camshaft.estimate; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
