"""Model FLOP/s utilisation by hand, and the table of peaks."""

from types import SimpleNamespace

import pytest
import torch

from camshaft import meter
from camshaft.datasheet import PEAKS, peak, type_name
from camshaft.models.config import resolve
from camshaft.profiling.findings import utilisation
from camshaft.recipe.schema import Model


def test_the_formula_by_hand():
    """PaLM, appendix B: 6 N + 12 L H Q T operations a token."""
    config = resolve(
        Model(
            vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False,
        ),
        None,
    )  # fmt: skip
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128 + 2 * 64
    counted = 3 * layer + 64 + 1000 * 64  # without the input table, which is looked up
    flops = 6 * counted + 12 * 3 * 4 * 16 * 96
    assert config.flops_per_token(96) == flops
    found = utilisation(flops, 5e8, 8, "NVIDIA H100 80GB HBM3", "bf16")
    assert found["flops_per_s_per_device"] == flops * 5e8 / 8
    assert found["mfu"] == pytest.approx(flops * 5e8 / 8 / 989.4e12)


@pytest.mark.parametrize(
    ("device", "kind"),
    [
        ("CPU", "fp32"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16"),
        ("NVIDIA A100-SXM4-80GB", "fp8"),
        ("Tesla V100-SXM2-32GB", "bf16"),
    ],
)
def test_an_unknown_peak_is_never_guessed(device, kind):
    found = utilisation(1e9, 1e4, 1, device, kind)
    assert found["mfu"] is None and device in found["reason"] and kind in found["reason"]


@pytest.mark.parametrize(
    ("dtype", "tf32", "name"),
    [
        (torch.bfloat16, True, "bf16"),
        (torch.float16, False, "fp16"),
        (torch.float32, False, "fp32"),
        (torch.float32, True, "tf32"),
        (torch.float64, True, "fp64"),
        (torch.float8_e4m3fn, False, "fp8"),
    ],
)
def test_the_type_of_products_names_the_column(dtype, tf32, name):
    assert type_name(dtype, tf32) == name


def test_figures_agree_with_one_another():
    """Of tensor cores each halving of the width doubles the rate, in each data sheet; none is one with sparsity."""
    assert peak("NVIDIA A100-SXM4-80GB", "bf16") == 312e12 and peak("NVIDIA B200", "fp8") == 4.5e15
    for device, rates in PEAKS.items():
        assert set(rates) <= {"fp8", "bf16", "fp16", "tf32", "fp32", "fp64"}, device
        if "bf16" in rates:
            assert rates["fp16"] == rates["bf16"]
            assert rates["tf32"] * 2 == pytest.approx(rates["bf16"], rel=0.02)
        if "fp8" in rates:
            assert rates["fp8"] == pytest.approx(2 * rates["bf16"], rel=0.02)
        assert rates["fp32"] <= rates.get("tf32", rates["fp16"])


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 2e9 * 1e4 / 2 / 989.4e12),
        ("NVIDIA H100 80GB HBM3", torch.float64, 2e9 * 1e4 / 2 / 66.9e12),
        ("NVIDIA GeForce GTX 1080", torch.float32, None),
    ],
)
def test_a_runs_records_use_the_same_table(monkeypatch, device, dtype, expected):
    """10,000 tokens in one second on two devices, of a model of 2 GFLOP a token."""
    clock = iter([100.0, 101.0])
    monkeypatch.setattr(meter.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: device)
    for name in ("max_memory_allocated", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda _: 0)
    world = SimpleNamespace(
        device=torch.device("cuda"),
        world_size=2,
        policy=SimpleNamespace(compute=dtype),
        recipe=SimpleNamespace(data=SimpleNamespace(sequence_length=8)),
    )
    config = SimpleNamespace(flops_per_token=lambda length: 2e9)
    counter = meter.Meter(SimpleNamespace(world=world, config=config, loader=SimpleNamespace(wait_s=0.0)))
    counter.count(10_000)
    rates = counter._rates()
    assert rates["perf/tflops_per_gpu"] == pytest.approx(10.0)
    assert rates.get("perf/mfu") == (None if expected is None else pytest.approx(expected))
