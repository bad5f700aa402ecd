"""The clip coefficient as a factor in AdamW's own pass: the same numbers as a pass over the gradients before it."""

from itertools import pairwise

import pytest
import torch
from textbook import adamw
from torch import nn

from camshaft.ops import Ops
from camshaft.plugin import Plugin, hookimpl
from camshaft.testing.compare import assert_within, compare
from camshaft.testing.run import record_ranks
from camshaft_adamw.optimizer import AdamW

BETAS, EPS, LR = (0.9, 0.95), 1e-8, 0.01


def parameters(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in ((7, 5), (3,), (0,))]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return made


def textbook_update(parameters, gradients, first, second, step, *, lr, betas, eps, weight_decay, scale):
    """The paper's rule on the optimizer's lists."""
    for x, g, m, v in zip(parameters, gradients, first, second, strict=True):
        state = {"step": torch.tensor(float(step - 1)), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
        group = {"betas": betas, "eps": eps, "lr": lr, "weight_decay": weight_decay}
        adamw(x, g if scale is None else g * scale, state, group)
        m.copy_(state["exp_avg"])
        v.copy_(state["exp_avg_sq"])


def built(kind, tensors, dtype):
    groups = [{"params": tensors[:1], "weight_decay": 0.1}, {"params": tensors[1:], "weight_decay": 0.0}]
    if kind == "update":
        return AdamW(groups, textbook_update, lr=LR, betas=BETAS, eps=EPS)
    return torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, fused=True)


def test_a_factor_in_the_pass_is_a_pass_with_the_factor():
    one, other = parameters(torch.float64), parameters(torch.float64)
    first, second = built("update", one, torch.float64), built("torch", other, torch.float64)
    for coefficient in (0.25, 0.37, None, 1e-3):
        first.scale = None if coefficient is None else torch.tensor(coefficient, dtype=torch.float64)
        first.step()
        for parameter in other:
            parameter.grad.mul_(1.0 if coefficient is None else coefficient)
        second.step()
        for index, (got, wanted) in enumerate(zip(one, other, strict=True)):
            torch.testing.assert_close(got, wanted, rtol=1e-13, atol=1e-15, msg=f"{coefficient}, {index}")
            got.grad, wanted.grad = torch.full_like(got, 0.3 + index), torch.full_like(got, 0.3 + index)


def test_an_update_of_ones_own_has_the_optimizers_state_and_rule():
    one, other = parameters(torch.float64), parameters(torch.float64)
    one[1].grad = other[1].grad = None
    first, second = built("update", one, torch.float64), built("torch", other, torch.float64)
    for round_ in range(4):
        if round_ == 2:  # begins later, with a step count of its own
            for made in (one, other):
                made[1].grad = torch.ones_like(made[1])
        first.step()
        second.step()
    states = first.state_dict()["state"], second.state_dict()["state"]
    assert states[0].keys() == states[1].keys() and states[0][1]["step"] == 2.0 and states[0][0]["step"] == 4.0
    for key in states[0]:
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(states[0][key][name], states[1][key][name], rtol=1e-13, atol=1e-15)
    for got, wanted in zip(one, other, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-13, atol=1e-15)


class Offers(Plugin):
    """The paper's rule instead of torch's. Fails unless clipping is left to the step, which gets gradients as they were
    when the norm was taken."""

    @hookimpl
    def rewrite(self, world):
        world.ops.replace({"updates.adamw": textbook_update})

    @hookimpl
    def around_step(self, state, call):
        def step():
            assert state.world.scales_gradients and float(state.gradient_scale) < 1
            if state.world.parts.everyone is None:
                norm = torch.stack([part.tensor.grad.norm() for part in state.world.parts]).norm()
                assert abs(norm / state.grad_norm - 1) < 1e-12
            call()

        return step


@pytest.mark.parametrize("storage", [{"ddp": {}}, {"ddp": None, "zero": {"stage": 2}}], ids=["ddp", "zero2"])
def test_runs_agree_with_torchs_optimizer(make_recipe, storage):
    plugins = {**storage, "adamw": {"lr": 0.01}, "clip": {"max_norm": 0.05}, "precision": {"compute": "fp64"}}
    resolved = make_recipe(plugins, 2)
    left, before = (record_ranks(resolved, 2, observers)[0] for observers in ({"offers": Offers()}, {}))
    assert all(record.norm > 0.05 for record in before), "clipping is active"
    worst = compare(left, before)
    assert_within(worst, dict.fromkeys(worst, 1e-12))


class Replaces(Plugin):
    """The paper's rule instead of torch's."""

    @hookimpl
    def rewrite(self, world):
        world.ops.replace({"updates.adamw": textbook_update})


def test_a_factor_is_of_its_own_step_alone(make_recipe):
    """Windows that are clipped, and behind them one that is not: there is no factor then, on a CPU."""

    def run(max_norm, observers):
        plugins = {"adamw": {"lr": 0.01}, "clip": {"max_norm": max_norm}, "precision": {"compute": "fp64"}, "ddp": None}
        training = {"max_steps": 5, "log_every": 1}
        return record_ranks(make_recipe(plugins, 1, training=training), 1, observers)[0]

    norms = [float(record.norm) for record in run(None, {})]
    limit = (min(norms[1:]) + max(norms[:-1])) / 2
    wanted, found = run(limit, {}), run(limit, {"replaces": Replaces()})
    clipped = [float(record.norm) > limit for record in wanted]
    assert (True, False) in pairwise(clipped), clipped
    worst = compare(found, wanted)
    assert_within(worst, dict.fromkeys(worst, 1e-12))


@pytest.mark.parametrize("first", ["torch's", "ours"])
def test_a_run_goes_on_with_the_other_arithmetic(make_recipe, tmp_path, first):
    """Another machine may have other kernels: the state is the same."""
    plugins = {"adamw": {"lr": 0.01}, "clip": {"max_norm": 0.05}, "precision": {"compute": "fp64"}, "ddp": None}

    def run(steps, own):
        saves = {"checkpoint": {"every_steps": 2}}
        training = {"max_steps": steps, "log_every": 1}
        resolved = make_recipe(plugins | saves, 1, training=training, run={"dir": str(tmp_path / first)})
        return record_ranks(resolved, 1, {"offers": Offers()} if own else {})[0]

    straight = record_ranks(make_recipe(plugins, 1, training={"max_steps": 4, "log_every": 1}), 1)[0]
    run(2, first == "ours")
    rest = run(4, first != "ours")
    assert [record.step for record in rest] == [3, 4]
    worst = compare(rest, straight[2:])
    assert_within(worst, dict.fromkeys(worst, 1e-12))


def test_the_table_takes_updates_by_name_and_refuses_what_nothing_calls():
    ops = Ops()
    ops.replace({"updates.adamw": textbook_update, "swiglu": torch.mul})
    assert ops.updates == {"adamw": textbook_update} and ops.swiglu is torch.mul
    for name in ("updates", "swish", "swiglu.adamw"):
        with pytest.raises(ValueError, match=name):
            ops.replace({name: torch.mul})
