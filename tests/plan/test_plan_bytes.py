"""What ``camshaft plan`` says of bytes, against the tensors of a run."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from camshaft import Plan, Widths
from camshaft.cli import estimate, run
from camshaft.cli import ranks as rank_pages
from camshaft.errors import PluginError
from camshaft.estimate import Estimate, StateBytes
from camshaft.host import Host
from camshaft.plugin import Plugin, hookimpl
from camshaft.recipe import check
from camshaft.testing.run import record_ranks

RECIPES = Path(__file__).parents[2] / "recipes"
ADAMW = {"adamw": {"lr": 1e-3}}


class Counts(Plugin):
    """Counts the live tensors of a rank by kind, when gradients are final."""

    @hookimpl
    def post_step(self, state):
        held = [each for entry in state.optimizer.state.values() for key, each in entry.items() if key != "step"]
        parameters = [parameter for _, parameter in state.model.named_parameters()]
        found = StateBytes(bytes_of(parameters), self.gradients, 0, bytes_of(held))
        assert found == self.expected, f"{found} instead of {self.expected}"
        state.extras["plugin/counts/seen"] = 1

    @hookimpl
    def post_reduce(self, state):
        self.gradients = bytes_of([p.grad for p in state.model.parameters() if p.grad is not None])


def bytes_of(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def counted(resolved, world_size):
    host = Host.of(resolved.recipe.plugins)
    return estimate.estimate(check(resolved, world_size).require(), host)


@pytest.mark.parametrize(
    ("optimizer", "world_size"),
    [(ADAMW, 1), (ADAMW, 2), ({"sgd": {"lr": 1e-3}}, 2), ({"sgd": {"lr": 1e-3, "momentum": 0.9}}, 2)],
)
def test_the_estimate_is_what_a_run_holds(make_recipe, optimizer, world_size):
    resolved = make_recipe(optimizer, world_size, training={"max_steps": 2, "log_every": 1})
    observer = Counts()
    observer.expected = counted(resolved, world_size).state
    (records, *_) = record_ranks(resolved, world_size, {"counts": observer})
    assert len(records) == 2


def test_the_sum_over_ranks_costs_twice_the_gradients(make_recipe):
    elements = sum(
        each.elements for each in estimate.sizes(check(make_recipe(ADAMW), 1).require(), Host({})).parameters
    )
    for ranks in (2, 3, 4):
        found = counted(make_recipe(ADAMW, ranks, accumulation=1), ranks)
        (sent,) = found.sent
        assert (sent.axis, sent.op) == ("dp", "all_reduce")
        assert sent.bytes == pytest.approx(2 * (ranks - 1) / ranks * elements * 4, abs=1)
    assert counted(make_recipe(ADAMW), 1).sent == ()


def test_a_bucket_is_never_larger_than_all_gradients_nor_smaller_than_one(make_recipe):
    shapes = estimate.sizes(check(make_recipe(ADAMW), 1).require(), Host({})).parameters
    for size, expected in ((1000, 4 * sum(each.elements for each in shapes)), (1e-6, 4 * 259 * 20)):
        found = counted(make_recipe({"ddp": {"bucket_size_mb": size}, **ADAMW}, 2), 2)
        assert dict(found.buffers) == {"fresh gradients, of one bucket": expected}


def shown_for(checked, host):
    return rank_pages.show(rank_pages.Ranks(checked, host), None)


def shown(capsys, *arguments):
    assert run(["plan", *arguments]) == 0
    return capsys.readouterr().out


def test_plan_prints_memory_and_traffic(capsys):
    text = shown(capsys, str(RECIPES / "llama3_8b_ddp.yaml"), "--world-size", "64")
    memory = text.split("model state per rank")[1].split("\n\n")[0]
    rows = {line.rsplit("  ", 3)[0].strip(): line.split() for line in memory.splitlines()[1:]}
    assert rows["parameters"][-3:] == ["32,121,044,992", "32.1", "29.9"]
    assert rows["model state"][-3:] == ["128,484,179,968", "128", "120"]
    assert "dp    all_reduce  63,238,307,328  63.2" in text


def test_plan_counts_4096_ranks_at_once_and_without_torch():
    recipe = str(RECIPES / "llama3_8b_ddp.yaml")
    code = (
        "import sys; from camshaft.cli import run\n"
        f"assert run(['plan', {recipe!r}, '--world-size', '4096', 'batch.global_batch_size=4096']) == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert "model state per rank" in done.stdout and time.monotonic() - began < 10


class Narrow(Plugin):
    @hookimpl
    def plan(self):
        return Plan(widths=Widths(2, 2, 2, 4))


class Builds(Plugin):
    @hookimpl
    def build_model(self, world, config):
        raise AssertionError


def test_widths_come_from_plans_and_a_plugins_own_model_has_no_shapes(make_recipe):
    resolved = make_recipe(ADAMW)
    checked = check(resolved, 1).require()
    checked.plans["narrow"] = Narrow().plan()
    found = estimate.sizes(checked, Host({"builds": Builds()}))
    assert found.widths == Widths(2, 2, 2, 4) and found.moments == 2 and found.accumulation == 3
    assert found.parameters is None and found.elements == found.trained == checked.config.num_parameters()
    text = shown_for(checked, Host({"builds": Builds()}))
    assert "a plugin builds a model of its own" in text and "master weights" in text


class Wrong(Plugin):
    @hookimpl
    def estimate(self):
        return 7


class Unknown(Plugin):
    @hookimpl
    def estimate(self, sizes):
        return Estimate(StateBytes(1, 2, 0, None), notes=("nobody knows",))


def test_an_answer_of_another_type_is_the_plugins_fault(make_recipe):
    resolved = make_recipe(ADAMW)
    with pytest.raises(PluginError, match="plugin 'wrong', hook 'estimate': must return an Estimate or None, got int"):
        estimate.estimate(check(resolved, 1), Host({"wrong": Wrong()}))


def test_what_is_unknown_is_called_unknown(make_recipe):
    resolved = make_recipe(ADAMW)
    text = shown_for(check(resolved, 1), Host({"unknown": Unknown()}))
    assert "optimizer values  unknown" in text and "does not say what it keeps" in text
    assert text.endswith("nobody knows")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (120.0, "120"), (31.406, "31.4"), (1.875, "1.88"), (0.00123456, "0.00123"), (4e4, "40,000")],
)
def test_short_numbers_keep_three_digits(value, text):
    assert estimate.short(value) == text
