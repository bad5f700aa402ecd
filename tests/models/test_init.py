from __future__ import annotations

import math
import tracemalloc
import weakref

import numpy as np
import pytest
import torch
from model_reference import LLAMA3, odd
from torch import nn

from camshaft.models.init import BLOCK, fill, materialize, values
from camshaft.models.llama import Llama
from camshaft.models.roles import Initial, roles

STD = Initial(std=0.02)


def on_meta(config):
    with torch.device("meta"):
        return Llama(config)


def state(config, *, seed=0, dtype=torch.float32, model=None):
    model = on_meta(config) if model is None else model
    materialize(model, seed=seed, device="cpu", dtype=dtype)
    return {name: value.clone() for name, value in model.state_dict().items()}


def whole(shape, name="a.weight", seed=0, dtype=torch.float32):
    target = torch.empty(shape, dtype=dtype)
    fill(target, name, STD, seed=seed)
    return target


def test_any_slice_equals_the_whole():
    length = 3 * BLOCK + 123
    full = whole((length,))
    for start, stop in [(0, length), (0, 1), (5, 9), (BLOCK - 1, BLOCK + 1), (BLOCK, BLOCK), (7, 2 * BLOCK + 3)]:
        assert torch.equal(values("a.weight", STD, seed=0, start=start, stop=stop), full[start:stop])
    assert torch.equal(values("a.weight", STD, seed=0, start=length - 3, stop=length), full[-3:])


@pytest.mark.parametrize(
    ("offset", "size"),
    [
        ((0, 0), (301, 700)), ((100, 0), (77, 700)), ((0, 233), (301, 234)), ((300, 699), (1, 1)), ((5, 7), (290, 401)),
        ((301, 0), (0, 700)),
    ],
)  # fmt: skip
def test_a_shard_along_any_dimension_equals_its_part_of_the_whole(offset, size):
    full = whole((301, 700))
    shard = torch.full(size, math.nan)
    fill(shard, "a.weight", STD, seed=0, shape=(301, 700), offset=offset)
    rows, columns = (slice(at, at + n) for at, n in zip(offset, size, strict=True))
    assert torch.equal(shard, full[rows, columns])


def test_shards_of_three_dimensions_and_of_none():
    full = whole((4, 60, 500))
    shard = torch.empty(2, 60, 123)
    fill(shard, "a.weight", STD, seed=0, shape=full.shape, offset=(1, 0, 77))
    assert torch.equal(shard, full[1:3, :, 77:200])
    scalar = torch.empty(())
    fill(scalar, "a.weight", STD, seed=0)
    assert scalar == full[0, 0, 0]


@pytest.mark.parametrize(
    ("shape", "offset"), [((4, 4), (1, 0)), ((4, 4), (0, -1)), ((4,), (0,)), ((4, 4, 4), (0, 0, 0))]
)
def test_a_shard_outside_the_whole_is_refused(shape, offset):
    with pytest.raises(ValueError, match="shard"):
        fill(torch.empty(4, 4), "a.weight", STD, seed=0, shape=shape, offset=offset)


def test_values_do_not_depend_on_the_length_of_the_parameter():
    assert torch.equal(whole((1000,)), whole((5 * BLOCK,))[:1000])


def test_seed_name_and_block_each_give_other_values():
    base = whole((2 * BLOCK,))
    for other in (whole((2 * BLOCK,), seed=1), whole((2 * BLOCK,), name="b.weight"), base.roll(BLOCK)):
        assert (base == other).float().mean() < 1e-3
        assert abs(float((base * other).mean()) / 0.02**2) < 5 / math.sqrt(2 * BLOCK)


def test_seeds_that_differ_in_high_bits_only_differ():
    """torch's CPU generator keeps 32 bits of a seed."""
    assert not torch.equal(whole((100,), seed=5), whole((100,), seed=5 + 2**32))
    assert not torch.equal(whole((100,), seed=5), whole((100,), seed=2**63 - 1))


def test_values_are_normal():
    sample = whole((40 * BLOCK,)).double() / 0.02
    count = sample.numel()
    assert abs(sample.mean()) < 5 / math.sqrt(count)
    assert abs(sample.var() - 1) < 5 * math.sqrt(2 / count)
    assert abs((sample**3).mean()) < 5 * math.sqrt(15 / count)
    assert abs((sample**4).mean() - 3) < 5 * math.sqrt(96 / count)
    ordered = sample.sort().values
    cdf = torch.special.ndtr(ordered)
    steps = torch.arange(1, count + 1, dtype=torch.float64) / count
    assert float((cdf - steps).abs().max()) < 2.0 / math.sqrt(count)  # Kolmogorov-Smirnov, p = 0.0007


def test_values_stay_what_they_were():
    """A change here changes every new run: it must be meant."""
    got = values("model.embed_tokens.weight", Initial(std=1.0), seed=0, start=BLOCK - 2, stop=BLOCK + 2)
    assert got.tolist() == pytest.approx([0.10844841, 0.72746617, 0.11803151, -0.7593261], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_dtype_starts_from_the_same_fp32_numbers(dtype):
    exact, cast = state(odd(attention_bias=True)), state(odd(attention_bias=True), dtype=dtype)
    assert exact.keys() == cast.keys()
    for name, value in exact.items():
        assert cast[name].dtype is dtype and torch.equal(cast[name], value.to(dtype)), name


def test_values_do_not_depend_on_the_order_of_construction_nor_on_the_global_generator():
    config = odd(tie_word_embeddings=True)
    torch.manual_seed(1)
    first = state(config)
    before = torch.manual_seed(2).get_state()
    model = on_meta(config)
    layers = model.model.layers
    del model.model.layers
    model.model.layers = layers  # now after the last norm
    second = state(config, model=model)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.keys() == second.keys() and list(first) != list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_model_that_is_not_on_meta_gets_the_same_values():
    config = odd(qk_norm=True, rope_scaling=LLAMA3)
    built = state(config, model=Llama(config))
    assert all(torch.equal(built[name], value) for name, value in state(config).items())


def test_the_number_of_layers_changes_only_the_scale_of_residual_projections():
    few, many = state(odd(num_hidden_layers=2)), state(odd(num_hidden_layers=8))
    assert few.keys() < many.keys()
    for name, value in few.items():
        if "o_proj" in name or "down_proj" in name:
            torch.testing.assert_close(many[name] * 2, value, rtol=1e-6, atol=0.0)
        else:
            assert torch.equal(many[name], value), name


def test_a_layer_starts_differently_from_its_neighbour():
    found = state(odd())
    assert not torch.equal(found["model.layers.0.mlp.up_proj.weight"], found["model.layers.1.mlp.up_proj.weight"])


def test_standard_deviations():
    config = odd(hidden_size=96, head_dim=16, intermediate_size=256, vocab_size=601, initializer_range=0.02)
    found = state(config, seed=4)
    for name, value in found.items():
        if value.ndim == 2:
            wanted = 0.02 / math.sqrt(6) if "o_proj" in name or "down_proj" in name else 0.02
            assert float(value.std()) == pytest.approx(wanted, rel=5 / math.sqrt(2 * value.numel())), name


def test_norms_are_one_and_biases_zero():
    config = odd(attention_bias=True, qk_norm=True)
    found, kinds = state(config), roles(on_meta(config))
    for kind, constant in (("norm", 1.0), ("bias", 0.0)):
        names = [name for name in found if kinds[name] == kind]
        assert len(names) > config.num_hidden_layers
        assert all(torch.equal(found[name], torch.full_like(found[name], constant)) for name in names)


def test_a_tied_parameter_is_made_once_under_its_first_name():
    tied, apart = on_meta(odd(tie_word_embeddings=True)), state(odd())
    found = state(odd(tie_word_embeddings=True), model=tied)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert torch.equal(found["model.embed_tokens.weight"], apart["model.embed_tokens.weight"])
    assert torch.equal(tied.lm_head.weight, found["model.embed_tokens.weight"])


def test_parameters_stay_the_same_objects():
    model = on_meta(odd(tie_word_embeddings=True))
    model.model.norm.weight.requires_grad_(False)
    frozen, table = model.model.norm.weight, model.model.embed_tokens.weight
    table.owner = "somebody"
    optimizer = torch.optim.SGD([table], lr=0.1)
    materialize(model, seed=0, device="cpu", dtype=torch.float64)
    assert model.model.norm.weight is frozen and not frozen.requires_grad
    assert optimizer.param_groups[0]["params"][0] is model.lm_head.weight
    assert table.owner == "somebody" and table.device.type == "cpu" and table.dtype is torch.float64
    assert all(parameter.requires_grad for parameter in model.parameters() if parameter is not frozen)
    assert all(isinstance(parameter, nn.Parameter) and parameter.is_leaf for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_that_would_be_lost_are_refused_by_name(kind):
    model = on_meta(odd())
    getattr(model.model.norm.weight, kind)(lambda _: None)
    with pytest.raises(ValueError, match=r"model\.norm\.weight.*hooks"):
        materialize(model, seed=0, device="cpu", dtype=torch.float32)


class Scaled(nn.Module):
    """Foreign: no `roles`, no `reset_buffers`, parameters and buffers of its own."""

    def __init__(self, persistent):
        super().__init__()
        self.scale, self.mix = nn.Parameter(torch.empty(7)), nn.Parameter(torch.empty(7, 5))
        self.norm = nn.LayerNorm(5)
        self.register_buffer("table", torch.arange(3.0), persistent=persistent)


def test_modules_of_others_get_values_by_type_and_shape():
    model = Scaled(persistent=True)
    materialize(model, seed=0, device="cpu", dtype=torch.float32)
    assert torch.equal(model.scale, torch.ones(7)) and torch.equal(model.norm.weight, torch.ones(5))
    assert torch.equal(model.norm.bias, torch.zeros(5)) and torch.equal(model.table, torch.arange(3.0))
    assert torch.equal(model.mix, whole((7, 5), name="mix"))


@pytest.mark.parametrize("persistent", [True, False])
def test_a_buffer_that_nobody_can_compute_is_refused_by_name(persistent):
    with torch.device("meta"):
        model = nn.ModuleDict({"inner": Scaled(persistent)})
    with pytest.raises(ValueError, match=r"inner\.table.*reset_buffers"):
        materialize(model, seed=0, device="cpu", dtype=torch.float32)


def test_a_large_parameter_needs_one_block_besides_itself():
    target = torch.empty(64 * BLOCK, dtype=torch.bfloat16)
    tracemalloc.start()
    try:
        fill(target, "a.weight", STD, seed=0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert BLOCK * 4 < peak < 3 * BLOCK * 4 + 10_000


def test_a_column_shard_makes_each_block_once(monkeypatch):
    """4 rows lie in a block: made row by row, every block would be made 4 times."""
    made, genuine = [], np.random.Philox
    monkeypatch.setattr(np.random, "Philox", lambda **place: made.append(place["counter"]) or genuine(**place))
    fill(torch.empty(1024, 8), "a.weight", STD, seed=0, shape=(1024, BLOCK // 4), offset=(0, 2000))
    assert len(made) == len(set(made)) == 256


def test_weak_references_that_would_be_lost_are_refused_by_name():
    model = on_meta(odd())
    reference = weakref.ref(model.model.norm.weight)
    with pytest.raises(ValueError, match=r"model\.norm\.weight.*weakref"):
        materialize(model, seed=0, device="cpu", dtype=torch.float32)
    assert reference() is not None


def test_several_threads_make_the_same_values():
    config, threads = odd(tie_word_embeddings=True), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = state(config)
        torch.set_num_threads(3)
        three = state(config)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one[name], three[name]) for name in one)
