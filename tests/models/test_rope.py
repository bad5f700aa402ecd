from __future__ import annotations

import math

import pytest
import torch
from model_reference import LLAMA3, built, frequency, odd

from camshaft.models.config import resolve
from camshaft.models.init import materialize
from camshaft.models.layers import RotaryEmbedding, inverse_frequencies
from camshaft.models.llama import Llama
from camshaft.ops import rotate
from camshaft.recipe.schema import Model


@pytest.mark.parametrize("preset", ["llama-3-8b", "llama-3.1-8b", "llama-3.2-1b", "qwen3-8b"])
def test_frequencies_of_published_models(preset):
    config = resolve(Model(preset=preset), None)
    wanted = [frequency(config, pair) for pair in range(config.head_dim // 2)]
    torch.testing.assert_close(
        inverse_frequencies(config), torch.tensor(wanted, dtype=torch.float64), rtol=1e-14, atol=0.0
    )


def test_llama3_scaling_keeps_stretches_and_blends():
    plain, scaled = (inverse_frequencies(odd(rope_scaling=scaling, head_dim=64)) for scaling in (None, LLAMA3))
    ratio = plain / scaled
    assert ratio[0] == 1.0 and ratio[-1] == pytest.approx(8.0)
    assert ((ratio > 1.001) & (ratio < 7.999)).any()
    assert (ratio.diff() > -1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tables_hold_the_angles_of_far_positions(dtype):
    config = odd(head_dim=8, rope_theta=500_000.0)
    positions = torch.tensor([[0, 1, 100_000, 131_071]])
    cos, sin = RotaryEmbedding(config)(positions, dtype)
    assert cos.dtype is dtype and cos.shape == sin.shape == (1, 4, 1, 8)
    for place, position in enumerate(positions[0].tolist()):
        for pair in range(4):
            angle = position * frequency(config, pair)
            wanted = (math.cos(angle), math.cos(angle), -math.sin(angle), math.sin(angle))
            got = (
                cos[0, place, 0, pair],
                cos[0, place, 0, pair + 4],
                sin[0, place, 0, pair],
                sin[0, place, 0, pair + 4],
            )
            assert [float(value) for value in got] == pytest.approx(
                wanted, abs=1e-7 if dtype is torch.float32 else 1e-9
            )


def test_scores_depend_on_distance_only():
    rope = RotaryEmbedding(odd(head_dim=16))
    query, key = torch.randn(2, 1, 1, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def score(at, seen):
        tables = [rope(torch.tensor([[place]]), torch.float64) for place in (at, seen)]
        return (rotate(query, tables[0], torch.float64) * rotate(key, tables[1], torch.float64)).sum(-1)

    torch.testing.assert_close(score(9, 4), score(70_009, 70_004), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(score(9, 4), score(9, 5))


def test_frequencies_survive_casts_and_are_in_no_state_dict():
    config = odd(rope_scaling=LLAMA3, head_dim=12)
    wanted = inverse_frequencies(config)
    model = built(config, torch.float32)
    for change in (lambda: model.bfloat16(), lambda: model.half(), lambda: model.double(), lambda: model.to("cpu")):
        change()
        assert torch.equal(model.model.rotary_emb.inv_freq, wanted)
        assert model.model.rotary_emb.inv_freq.dtype is torch.float64
    assert not [name for name in model.state_dict() if "inv_freq" in name]


@pytest.mark.parametrize("how", ["materialize", "to_empty"])
def test_frequencies_are_right_after_meta(how):
    config = odd(rope_scaling=LLAMA3, head_dim=12)
    with torch.device("meta"):
        model = Llama(config)
    assert model.model.rotary_emb.inv_freq.is_meta
    if how == "materialize":
        materialize(model, seed=0, device="cpu", dtype=torch.bfloat16)
    else:
        model.to_empty(device="cpu")
    assert torch.equal(model.model.rotary_emb.inv_freq, inverse_frequencies(config))
