"""The precision policy: dtypes by option and device, what goes together, autocast only where it changes something."""

from types import SimpleNamespace

import pytest
import torch

from camshaft.claims import Widths
from camshaft_precision import Options, Plugin, rules
from camshaft_precision import policy as module
from camshaft_precision.policy import autocast, policy

CPU = torch.device("cpu")
FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("options", "param", "compute", "reduce", "master", "kept"),
    [
        ({"compute": "fp64"}, FP64, FP64, FP64, FP64, FP64),
        ({"compute": "fp32"}, FP32, FP32, FP32, FP32, FP32),
        ({"compute": "bf16"}, FP32, BF16, FP32, FP32, FP32),
        ({"compute": "fp16"}, FP32, FP16, FP32, FP32, FP32),
        ({"compute": "bf16", "parameters": "fp32", "gradients": "fp32"}, FP32, BF16, FP32, FP32, FP32),
        ({"compute": "bf16", "parameters": "bf16"}, BF16, BF16, FP32, FP32, BF16),
        ({"compute": "fp16", "parameters": "fp16", "reduce": "fp16"}, FP16, FP16, FP16, FP32, FP16),
        ({"parameters": "bf16", "gradients": "fp32", "reduce": "bf16"}, BF16, BF16, BF16, FP32, FP32),
        ({"parameters": "fp16"}, FP16, FP16, FP32, FP32, FP16),
        ({"compute": "fp32", "reduce": "bf16"}, FP32, FP32, BF16, FP32, FP32),
    ],
)
def test_policies(options, param, compute, reduce, master, kept):
    plugin = Plugin(Options(**options))
    plugin.name = "precision"
    plan = plugin.plan(SimpleNamespace(device="cpu", recipe=SimpleNamespace(launch=SimpleNamespace(device="cpu"))))
    assert plan.problems == ()
    chosen = policy(plugin.options, CPU)
    assert (chosen.param, chosen.compute, chosen.reduce, chosen.master, chosen.kept) == (
        param,
        compute,
        reduce,
        master,
        kept,
    )
    kinds = (param, kept, reduce, master, compute)
    assert plan.widths == Widths(*(dtype.itemsize for dtype in kinds))


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"compute": "fp64", "parameters": "bf16"}, "parameters"),
        ({"compute": "fp64", "parameters": "fp32"}, "parameters"),
        ({"compute": "fp64", "reduce": "fp32"}, "reduce"),
        ({"compute": "fp64", "gradients": "fp32"}, "gradients"),
        ({"compute": "fp32", "parameters": "bf16"}, "parameters"),
        ({"compute": "bf16", "parameters": "fp16"}, "parameters"),
        ({"compute": "fp16", "parameters": "bf16"}, "parameters"),
        ({"compute": "bf16", "gradients": "bf16"}, "gradients"),
        ({"parameters": "bf16", "gradients": "fp16"}, "gradients"),
        ({"compute": "bf16", "reduce": "fp16"}, "reduce"),
        ({"compute": "auto", "reduce": "fp16"}, "reduce"),
        ({"compute": "bf16", "initial_loss_scale": 1024.0}, "initial_loss_scale"),
        ({"compute": "auto", "growth_interval": 2000}, "growth_interval"),
        ({"compute": "fp16", "initial_loss_scale": 1000.0}, "initial_loss_scale"),
    ],
)
def test_what_does_not_go_together_is_refused_with_key_and_fix(options, key):
    (problem,) = rules.problems(Options(**options), "plugins.precision")
    assert problem.key == f"plugins.precision.{key}" and problem.fix and problem.message


def test_a_fix_that_is_followed_is_legal():
    assert not list(rules.problems(Options(compute="fp16", initial_loss_scale=1024.0), "k"))
    (problem,) = rules.problems(Options(compute="fp16", initial_loss_scale=1000.0), "k")
    assert problem.fix == "set it to 1024"
    (problem,) = rules.problems(Options(compute="fp32", parameters="bf16"), "k")
    assert "k.compute=bf16" in problem.fix
    assert not list(rules.problems(Options(compute="bf16", parameters="bf16"), "k"))


@pytest.mark.parametrize(
    ("flags", "compute"),
    [("flags : fpu amx_bf16 amx_tile", BF16), ("flags : fpu avx512_bf16", BF16), ("flags : fpu", FP32)],
)
def test_auto_takes_bf16_where_the_cpu_is_fast_at_it(monkeypatch, tmp_path, flags, compute):
    (tmp_path / "cpuinfo").write_text(flags)
    monkeypatch.setattr(module, "Path", lambda _: tmp_path / "cpuinfo")
    module.fast_bf16.cache_clear()
    assert policy(Options(), CPU).compute == compute
    assert policy(Options(parameters="bf16"), CPU).compute == BF16, "whatever the CPU is fast at"
    module.fast_bf16.cache_clear()


def test_autocast_wraps_only_when_it_changes_something():
    def call(batch):
        return torch.ones(2, 2) @ torch.ones(2, 2)

    for options in ({"compute": "fp64"}, {"compute": "fp32"}, {"parameters": "bf16"}, {"parameters": "fp16"}):
        assert autocast(SimpleNamespace(policy=policy(Options(**options), CPU), device=CPU), call) is call
    for compute, dtype in (("bf16", BF16), ("fp16", FP16)):
        narrow = autocast(SimpleNamespace(policy=policy(Options(compute=compute), CPU), device=CPU), call)
        assert narrow(None).dtype == dtype
    assert call(None).dtype == torch.float32


@pytest.mark.parametrize("options", [{"compute": "bf16"}, {"compute": "fp32"}, {"parameters": "bf16"}])
def test_without_fp16_nothing_is_scaled_and_the_step_is_left_as_it_is(options):
    plugin = Plugin(Options(**options))
    state = SimpleNamespace(loss_scale=None)

    def call():
        raise AssertionError("not called here")

    assert plugin.around_step(state, call) is call
    plugin.post_reduce()
    plugin.load_state_dict({"loss_scale": 4.0, "good_steps": 1, "skipped_steps": 2})
    assert state.loss_scale is None and plugin.state_dict() == {}
