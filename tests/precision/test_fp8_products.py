"""Products of 8-bit numbers against ones that quantise explicitly, in fp64."""

import math

import pytest
import torch
from torch import nn

from camshaft.comm import Channel
from camshaft.testing.ranks import run_ranks
from camshaft_precision import scaled
from camshaft_precision.delayed import Meter, Ring
from camshaft_precision.linear import forward_of
from camshaft_precision.scaled import E4M3, E5M2, amax, product, quantise, round_to, scale_of

BF16_ULP = 2.0**-8
"""Half the distance of two bf16 numbers, relative: what rounding the product to bf16 costs."""


def explicit(tensor, dtype, rowwise):
    """The values that ``tensor`` has after 8 bits, in fp64, written anew from the definition."""
    wide = tensor.double()
    largest = wide.abs().amax(-1, keepdim=True) if rowwise else wide.abs().amax()
    bits, most = (3, 448.0) if dtype is E4M3 else (2, 57344.0)
    least = -6 if dtype is E4M3 else -14
    scale = torch.where(largest > 0, 2.0 ** torch.floor(torch.log2(most / largest.clamp_min(1e-30))), 1.0)
    value = wide * scale
    exponent = torch.floor(torch.log2(value.abs().clamp_min(1e-300))).clamp_min(least)
    step = 2.0 ** (exponent - bits)
    return (torch.round(value / step) * step).clamp(-most, most) / scale


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize("spread", [0.0, 6.0, 20.0])
def test_rounding_is_the_formats_own(dtype, rowwise, spread):
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(33, 48, generator=generator) * torch.exp2(
        (torch.rand(33, 48, generator=generator) - 0.5) * 2 * spread
    )
    rounded = quantise(values, dtype, rowwise=rowwise)
    got = rounded.values.double() * rounded.inverse.double()
    assert torch.equal(got, explicit(values, dtype, rowwise))
    assert rounded.inverse.shape == ((33, 1) if rowwise else ()) and rounded.inverse.dtype == torch.float32


def test_scales_are_powers_of_two_that_use_the_format_and_do_not_overflow_it():
    largest = torch.tensor([1e-30, 3e-5, 1.0, 447.9, 448.0, 448.1, 3e38])
    for dtype in (E4M3, E5M2):
        scale = scale_of(largest, dtype).double()
        assert all(math.frexp(float(each))[0] == 0.5 for each in scale)
        used = scale * largest.double() / scaled.LARGEST[dtype]
        assert bool((used <= 1).all()) and bool((used[1:] > 0.5).all())  # a tiny one has the scale of zeros


@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize("left", [E4M3, E5M2])
@pytest.mark.parametrize(("m", "k", "n"), [(32, 16, 48), (1, 32, 16), (37, 64, 16)])
def test_products_equal_the_explicit_ones(rowwise, left, m, k, n):
    generator = torch.Generator().manual_seed(m)
    a, b = torch.randn(m, k, generator=generator), torch.randn(n, k, generator=generator) * 1e-3
    made = product(quantise(a, left, rowwise=rowwise), quantise(b, E4M3, rowwise=rowwise), fast=False)
    want = explicit(a, left, rowwise) @ explicit(b, E4M3, rowwise).t()
    assert made.dtype == torch.bfloat16 and made.shape == (m, n)
    assert float((made.double() - want).norm() / want.norm()) < BF16_ULP


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize("tokens", [16, 9])
def test_matrices_lie_as_a_gpus_kernels_take_them(rowwise, wide, tokens, monkeypatch):
    """The first by rows, the second by columns, whatever strides input and gradient have: a CPU takes any."""
    seen = []

    def scaled_mm(a, b, one, other, *, out_dtype, use_fast_accum):
        assert a.stride() == (a.shape[1], 1) and b.stride() == (1, b.shape[0])
        assert a.shape[1] % 16 == 0 and b.shape[1] % 16 == 0
        assert one.shape == ((len(a), 1) if rowwise else ()) and other.shape == ((1, b.shape[1]) if rowwise else ())
        assert one.is_contiguous() and other.is_contiguous() and out_dtype == torch.bfloat16
        assert {a.dtype, b.dtype} <= {E4M3, E5M2} and b.dtype == E4M3
        seen.append(use_fast_accum)
        return (a.float().mul(one) @ b.float().mul(other)).bfloat16()

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(scaled, "_CPU_KERNEL", True)
    found = []
    for turned in (False, True):
        module = layer(32, 48, True)
        source = torch.randn(1, tokens, 32, generator=torch.Generator().manual_seed(2))
        gradient = torch.randn(1, tokens, 48, generator=torch.Generator().manual_seed(3)).bfloat16()
        if turned:
            source, gradient = (each.transpose(1, 2).contiguous().transpose(1, 2) for each in (source, gradient))
        source.requires_grad_()
        forward_of(module, rowwise=rowwise, wide=wide, meter=None)(source).backward(gradient)
        found.append([source.grad, module.weight.grad, module.bias.grad])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert seen == 2 * [True, rowwise, *([] if wide else [rowwise])], "gradients tensorwise with all bits of fp32"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rowwise", [False, True])
def test_what_is_not_finite_comes_out_as_nan(bad, rowwise):
    values = torch.ones(16, 32)
    values[3, 5] = bad
    rounded = quantise(values, E4M3, rowwise=rowwise)
    made = product(rounded, quantise(torch.ones(16, 32), E4M3, rowwise=rowwise), fast=False)
    assert bool(made[3].isnan().all())
    assert bool(made[4].isfinite().all()) == rowwise, "one scale for all: no value of it is known any more"
    old = round_to(values, E4M3, torch.tensor(1.0))
    assert bool(old.values.float()[3, 5].isnan()), "nor where the scale is an old one"


def test_zeros_and_values_above_an_old_scale():
    zero = quantise(torch.zeros(4, 16), E4M3, rowwise=False)
    assert not zero.values.float().any() and bool(zero.inverse.isfinite())
    large = round_to(torch.tensor([[1.0, -1e9]]), E4M3, torch.tensor(2.0))
    assert (large.values.float() * large.inverse).tolist() == [[1.0, -224.0]]
    wide = round_to(torch.tensor([[1.0, -1e9]]), E5M2, torch.tensor(2.0))
    assert (wide.values.float() * wide.inverse).tolist() == [[1.0, -28672.0]], "inf without bounds, in every torch"
    assert float(amax(torch.zeros(2, 2), rowwise=False)) == 0.0


def layer(k, n, bias, seed=1):
    generator = torch.Generator().manual_seed(seed)
    module = nn.Linear(k, n, bias=bias)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / math.sqrt(k)
    return module


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize("shape", [(2, 7), (3, 16), (1, 1)])
def test_a_layer_and_its_gradients_equal_explicit_products(rowwise, wide, bias, shape):
    k, n, generator = 32, 48, torch.Generator().manual_seed(7)
    module = layer(k, n, bias)
    source = torch.randn(*shape, k, generator=generator).bfloat16().float().requires_grad_()
    gradient = (torch.randn(*shape, n, generator=generator) * 1e-4).bfloat16()
    made = forward_of(module, rowwise=rowwise, wide=wide, meter=None)(source)
    made.backward(gradient)
    x, g, w = source.detach().flatten(0, -2), gradient.flatten(0, -2), module.weight.detach()
    kind = E4M3 if rowwise else E5M2

    def close(got, want, what):
        gap, roundings = got.detach().double() - want, 3 if bias and what == "output" else 1
        assert float(gap.norm() / want.norm()) < roundings * BF16_ULP, what

    out = explicit(x, E4M3, rowwise) @ explicit(w, E4M3, rowwise).t()
    close(made.flatten(0, -2), out + module.bias.detach().double() if bias else out, "output")
    towards = explicit(g, kind, rowwise) @ explicit(w.t(), E4M3, rowwise).t()
    close(source.grad.flatten(0, -2), towards, "gradient of the input")
    if wide:
        product_of_weight = g.double().t() @ x.double()
    else:
        product_of_weight = explicit(g.t(), kind, rowwise) @ explicit(x.t(), E4M3, rowwise).t()
    close(module.weight.grad, product_of_weight, "gradient of the weight")
    assert module.weight.grad.dtype == torch.float32 and made.dtype == torch.bfloat16
    if bias:
        close(module.bias.grad, g.double().sum(0), "gradient of the bias")


def test_a_layer_without_tokens_or_without_what_trains():
    module = layer(16, 16, True)
    forward = forward_of(module, rowwise=False, wide=False, meter=None)
    assert forward(torch.zeros(0, 4, 16)).shape == (0, 4, 16)
    module.weight.requires_grad_(False)
    source = torch.randn(2, 16, requires_grad=True)
    forward(source).sum().backward()
    assert module.weight.grad is None and source.grad is not None
    module.weight.requires_grad_(True)
    forward(torch.randn(2, 16)).sum().backward()
    assert module.weight.grad is not None


def test_delayed_scales_follow_the_ring():
    ring = Ring(["a", "b"], 2, torch.device("cpu"), None)
    module = layer(16, 16, False)
    meter = ring.meter("b")
    forward = forward_of(module, rowwise=False, wide=False, meter=meter)
    source = torch.full((4, 16), 2.0)
    with torch.no_grad():
        forward(source * 1e6)  # an evaluation is no part of the history
    first = forward(source)
    assert torch.equal(first, forward_of(module, rowwise=False, wide=False, meter=None)(source)), "scaled as it is now"
    first.sum().backward()
    ring.turn()
    assert float(ring.scales[1, 0]) == 128.0 and float(ring.scales[1, 2]) == 32768.0  # 448 / 2 = 224; 57,344 / 1
    assert not ring.scales[0].any(), "a layer that was not used has no history"
    grown = forward(source * 8)  # 16 is above 448 / 128 = 3.5, where it saturates
    assert torch.allclose(grown, forward_of(module, rowwise=False, wide=False, meter=None)(source * 1.75), rtol=1e-2)
    ring.turn()
    assert float(ring.scales[1, 0]) == 16.0, "448 / 16 = 28, rounded down"
    for _ in range(2):
        forward(source)
        ring.turn()
    assert float(ring.scales[1, 0]) == 128.0, "the large window has left the ring"


def test_a_ring_goes_on_from_its_state_in_another_length_and_with_other_layers():
    ring = Ring(["a", "b"], 3, torch.device("cpu"), None)
    for window in range(1, 6):
        for name in ("a", "b"):
            ring.meter(name).note("input", torch.tensor(2.0**window))  # a power of two each: scales are such
        ring.turn()
    state = ring.state_dict()
    assert [row[0] for row in state["a"]] == [8.0, 16.0, 32.0]
    same, short, other = (Ring(names, size, torch.device("cpu"), None) for names, size in (
        (["a", "b"], 3), (["a", "b"], 2), (["b", "c"], 5),
    ))  # fmt: skip
    for each in (same, short, other):
        each.load_state_dict(state)
    assert torch.equal(same.scales, ring.scales) and torch.equal(short.scales, ring.scales)
    assert torch.equal(other.scales[0], ring.scales[1]) and not other.scales[1].any()
    for _ in range(2):
        same.turn(), ring.turn()
    assert same.state_dict() == ring.state_dict()


def agreed(rank, world_size):
    ring = Ring(["a"], 2, torch.device("cpu"), Channel(torch.distributed.group.WORLD, "precision", "dp"))
    ring.meter("a").note("input", torch.tensor(1.0 + 6 * rank))
    ring.meter("a").note("weight", torch.tensor(3.0))
    ring.turn()
    return ring.history.tolist(), ring.scales.tolist()


def test_ranks_agree_on_the_largest_of_all():
    """Not on a sum: what all of them have alike would grow with their number."""
    for history, scales in run_ranks(2, agreed, timeout_s=60):
        assert history == [[[7.0, 3.0, 0.0]], [[0.0, 0.0, 0.0]]]
        assert scales == [[64.0, 128.0, 0.0]]


def test_a_window_that_is_not_finite_leaves_the_scales():
    ring = Ring(["a"], 4, torch.device("cpu"), None)
    ring.meter("a").note("input", torch.tensor(2.0))
    ring.turn()
    before = ring.scales.clone()
    ring.meter("a").note("input", torch.tensor(math.nan))
    ring.turn()
    assert torch.equal(ring.scales, before)


def test_a_meter_is_a_view():
    largest, scales = torch.zeros(3), torch.zeros(3)
    Meter(largest, scales).note("gradient", torch.tensor(3.0))
    assert largest.tolist() == [0.0, 0.0, 3.0]
