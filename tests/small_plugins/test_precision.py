"""The precision policy: dtypes by option and device, and autocast only where it changes something."""

from types import SimpleNamespace

import pytest
import torch

from camshaft_precision import policy as module
from camshaft_precision.policy import autocast, policy

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("option", "param", "compute"),
    [
        ("fp64", torch.float64, torch.float64),
        ("fp32", torch.float32, torch.float32),
        ("bf16", torch.float32, torch.bfloat16),
    ],
)
def test_policies(option, param, compute):
    chosen = policy(option, CPU)
    assert (chosen.param, chosen.compute, chosen.reduce, chosen.master) == (param, compute, param, param)


@pytest.mark.parametrize(
    ("flags", "compute"),
    [("flags : fpu amx_bf16 amx_tile", "bf16"), ("flags : fpu avx512_bf16", "bf16"), ("flags : fpu", "fp32")],
)
def test_auto_takes_bf16_where_the_cpu_is_fast_at_it(monkeypatch, tmp_path, flags, compute):
    (tmp_path / "cpuinfo").write_text(flags)
    monkeypatch.setattr(module, "Path", lambda _: tmp_path / "cpuinfo")
    module.fast_bf16.cache_clear()
    assert policy("auto", CPU).compute == {"bf16": torch.bfloat16, "fp32": torch.float32}[compute]
    module.fast_bf16.cache_clear()


def test_autocast_wraps_only_when_it_changes_something():
    def call(batch):
        return torch.ones(2, 2) @ torch.ones(2, 2)

    same = SimpleNamespace(policy=policy("fp64", CPU), device=CPU)
    assert autocast(same, call) is call
    narrow = autocast(SimpleNamespace(policy=policy("bf16", CPU), device=CPU), call)
    assert narrow(None).dtype == torch.bfloat16
    assert call(None).dtype == torch.float32
