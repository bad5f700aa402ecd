"""What a proof says that it does not cover, and what its certificate is valid for."""

import dataclasses
import math
import sys
from importlib.metadata import EntryPoint

import pytest
import torch
from test_verify_shrink import small
from verify_recipes import ADAMW, TRAINING, recipe

from camshaft import Claim, Plan, Plugin, hookimpl, host, schedules
from camshaft.verify import certificate, code, covered
from camshaft.verify.examine import Finding, verify
from camshaft.verify.judge import BOUNDS, Deviation, compare
from camshaft.verify.record import Recording, Step
from camshaft.verify.sorting import BY_DESIGN, CHANGES_NUMBERS
from camshaft_clip import Plugin as Clip


def told(resolved, folder, steps=4):
    made, chosen, checked = small(resolved, folder, steps)
    return covered.of_recipe(resolved, checked, made, chosen, steps)


def says(lines, *words):
    return any(all(word in line for word in words) for line in lines)


def test_what_is_made_small_is_told(tmp_path):
    resolved = recipe(
        tmp_path,
        "tp",
        model={"preset": "llama-tiny", "num_hidden_layers": 9, "num_attention_heads": 8, "num_key_value_heads": 4},
        parallel={"tensor_parallel": 4},
        launch={"processes": 4, "device": "cpu"},
        batch={"micro_batch_size": 4, "global_batch_size": 64},
    )
    lines = told(resolved, tmp_path)
    assert says(lines, "axis tp of 4 ranks", "2 stand for them")
    assert says(lines, "16 microbatches of 4", "3 of 2")
    assert says(lines, "9 layers of width", "3 of width")
    assert says(lines, "lr_schedule.warmup_steps 20 as 2")
    assert says(lines, "after 4 steps") and says(lines, "races") and says(lines, "what both runs share: the model")
    assert not says(lines, "axis pp") and not says(lines, "axis dp")


def test_what_a_run_does_beside_its_steps_is_told(tmp_path):
    batch = {"micro_batch_size": 4, "global_batch_size": 32}
    assert not says(told(recipe(tmp_path, "kernels", batch=batch), tmp_path), "in halves")
    more = recipe(tmp_path, "kernels", batch={**batch, "on_out_of_memory": "halve"})
    assert says(told(more, tmp_path), "in halves")


def test_a_number_of_ranks_that_is_open_is_told(tmp_path):
    resolved = recipe(tmp_path, "ddp")
    assert not says(told(resolved, tmp_path), "axis dp")
    resolved = recipe(tmp_path, "ddp", launch={"processes": "auto", "device": "cpu"})
    assert says(told(resolved, tmp_path), "more than 2 ranks along axis dp", "auto")


def test_parameters_without_a_gradient_are_told():
    one, none = torch.ones(2), None
    steps = [Step(1, {"a": one, "b": none}, 1.0, {}, 1.0, 0.1, {}, {}, 1.0)]
    assert list(covered.without_gradient(Recording({"a": one}, steps=steps))) == []
    (line,) = covered.without_gradient(Recording({"a": one, "b": one}, steps=steps))
    assert "1 of 2 parameters" in line and "'b'" in line


def test_runs_without_a_step_prove_nothing():
    found = compare(Recording(), Recording(), BOUNDS["fp64"])
    assert found.first is not None and math.isinf(found.first.value)


def test_three_ranks_stay_three(tmp_path):
    def degree(processes):
        batch = {"micro_batch_size": 4, "global_batch_size": 8 * processes}
        resolved = recipe(tmp_path, "zero2", launch={"processes": processes, "device": "cpu"}, batch=batch)
        return resolved, small(resolved, tmp_path)[0].degrees["dp"]

    assert [degree(each)[1] for each in (1, 2, 3, 4, 5, 6)] == [1, 2, 3, 2, 3, 2]
    report = verify(degree(3)[0])
    assert report.green and report.world_size == 3, str(report.finding)


def test_a_proof_of_fewer_steps_is_another(tmp_path):
    resolved = recipe(tmp_path, "kernels", plugins={**ADAMW, "clip": TRAINING["clip"]})
    two, four = (certificate.valid_for(small(resolved, tmp_path, steps)[0]) for steps in (2, 4))
    assert two != four
    assert says(told(resolved, tmp_path, 2), "does not find this certificate")
    assert not says(told(resolved, tmp_path), "does not find")


def test_what_had_to_be_taken_out_keeps_certificates_apart(tmp_path):
    made = small(recipe(tmp_path, "kernels"), tmp_path)[0]
    other = dataclasses.replace(made, taken_out={"plugins.kernels.rope": "torch"})
    assert certificate.valid_for(made) != certificate.valid_for(other)
    assert certificate.valid_for(made) != certificate.valid_for(made, "the digest of other code")


def test_files_that_a_section_names_count(tmp_path):
    (tmp_path / "order.csv").write_text("F0,B0\n")
    section = {"table": "order.csv", "split": {"starts": ["no file", "\0", "x" * 5000]}}
    before = code.files([section], tmp_path)
    assert before.keys() == {"order.csv"}
    (tmp_path / "order.csv").write_text("F0,B1\n")
    assert code.files([section], tmp_path) != before and code.files([section], tmp_path / "elsewhere") == {}
    made = small(recipe(tmp_path, "kernels"), tmp_path)[0]
    other = dataclasses.replace(made, files=before)
    assert certificate.valid_for(made) != certificate.valid_for(other)


@pytest.fixture
def single_file(tmp_path, monkeypatch):
    """A plugin that is one file, whose class is of another such file, and a schedule that is one too."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "verify_base.py").write_text("from camshaft import Plugin as Core\n\n\nclass Base(Core):\n    pass\n")
    (site / "verify_alone.py").write_text("from verify_base import Base\n\n\nclass Plugin(Base):\n    pass\n")
    (site / "verify_order.py").write_text("OFFER = None\n")
    monkeypatch.syspath_prepend(site)
    points = {**host.installed(), "alone": EntryPoint("alone", "verify_alone:Plugin", host.GROUP)}
    monkeypatch.setattr(host, "installed", lambda: points)
    offers = {"backwards": EntryPoint("backwards", "verify_order:OFFER", schedules.GROUP)}
    monkeypatch.setattr(code, "offered", lambda: offers)
    yield site
    for name in ("verify_base", "verify_alone", "verify_order"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("changed", ["verify_alone.py", "verify_base.py", "verify_order.py"])
def test_code_of_single_files_bases_and_schedules_counts(single_file, changed):
    sections = {"alone": {"inner": {"schedule": "backwards"}}}
    before = code.code_digest(sections)
    assert code.code_digest(sections) == before
    with (single_file / changed).open("a") as file:
        file.write("# another\n")
    assert code.code_digest(sections) != before
    assert (code.code_digest({"alone": {}}) != before) and "verify_order" not in sys.modules


def test_tables_beside_the_code_count(tmp_path, monkeypatch):
    package = tmp_path / "verify_tables"
    package.mkdir()
    (package / "__init__.py").write_text("from camshaft import Plugin as Core\n\n\nclass Plugin(Core):\n    pass\n")
    (package / "table.yaml").write_text("a: 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    points = {**host.installed(), "tables": EntryPoint("tables", "verify_tables:Plugin", host.GROUP)}
    monkeypatch.setattr(host, "installed", lambda: points)
    before = code.code_digest({"tables": {}})
    (package / "__pycache__").mkdir(exist_ok=True)
    (package / "__pycache__" / "old.pyc").write_text("no code")
    assert code.code_digest({"tables": {}}) == before
    (package / "table.yaml").write_text("a: 2\n")
    assert code.code_digest({"tables": {}}) != before


def test_versions_of_what_plugins_need_count():
    found = code.versions({"adamw": {}})
    assert {"python", "torch", "camshaft", "plugin adamw", "package numpy", "package deepspeed"} <= found.keys()
    assert "package pytest" not in found, "what an extra needs that the recipe has nothing to do with"


class Lossy(Plugin):
    """Sums gradients over the data ranks, roughly."""

    @hookimpl
    def plan(self):
        return Plan(claims=(Claim("gradient.reduce", "dp"),), provides=(CHANGES_NUMBERS,))

    @hookimpl
    def reduce(self, state):
        raise AssertionError("it has no part in a proof")


def test_a_sum_that_changes_numbers_by_design_is_left_out_with_its_axis(tmp_path, monkeypatch):
    points = {**host.installed(), "lossy": EntryPoint("lossy", f"{__name__}:Lossy", host.GROUP)}
    monkeypatch.setattr(host, "installed", lambda: points)
    resolved = recipe(tmp_path, "ddp", plugins={**ADAMW, **TRAINING, "lossy": {}})
    made = small(resolved, tmp_path)[0]
    assert made.degrees["dp"] == 1 and "plugins.lossy" in made.taken_out
    report = verify(resolved)
    assert report.green and report.world_size == 1, str(report.finding)
    assert says(report.not_covered, "'lossy'", BY_DESIGN)
    assert says(report.not_covered, "axis dp of 2 ranks", "nothing that is compared works along it")


class NamesLayer(Plugin):
    """Works on one layer, and tells only when it is built that there is none of that number."""

    layer = 4

    @hookimpl
    def plan(self):
        return Plan(claims=(Claim("module.recompute", "", "model.layers.*.no_module"),))

    @hookimpl
    def recompute(self, model):
        self._found = self.layer < model.config.num_hidden_layers

    @hookimpl
    def inert(self):
        return None if self._found else f"there is no layer {self.layer}"


@pytest.fixture
def names_layer(monkeypatch):
    points = {**host.installed(), "names_layer": EntryPoint("names_layer", f"{__name__}:NamesLayer", host.GROUP)}
    monkeypatch.setattr(host, "installed", lambda: points)


def test_layers_that_a_plugin_names_are_there(tmp_path, names_layer):
    resolved = recipe(tmp_path, "kernels", plugins={**ADAMW, "names_layer": {}, **TRAINING})
    assert small(resolved, tmp_path)[0].tree["model"]["num_hidden_layers"] < 5
    report = verify(resolved)
    assert report.green, str(report.finding)
    assert report.small.tree["model"]["num_hidden_layers"] == 5
    assert certificate.valid_for(report.shrunk) == certificate.valid_for(small(resolved, tmp_path)[0])


def test_layers_that_are_known_to_be_needed_are_there_at_once(tmp_path):
    plugins = {**ADAMW, "recompute": {"mode": "full", "layers": [4]}, **TRAINING}
    assert small(recipe(tmp_path, "kernels", plugins=plugins), tmp_path)[0].tree["model"]["num_hidden_layers"] == 5


def test_a_plugin_that_does_nothing_at_any_depth_is_blamed(tmp_path, names_layer, monkeypatch):
    monkeypatch.setattr(NamesLayer, "layer", 9)
    report = verify(recipe(tmp_path, "kernels", plugins={**ADAMW, "names_layer": {}, **TRAINING}))
    assert report.finding is not None and report.finding.plugins == ("names_layer",), str(report.finding)


def test_who_is_not_looked_for_is_not_the_core():
    sign = Deviation(1, "loss", "", 1.0, 1e-3)
    assert "one of 'ddp', 'clip' changes" in str(Finding(sign, (), ("ddp", "clip")))
    assert "the core, without any plugin" in str(Finding(sign, (), ()))
    assert "'ddp' changes" in str(Finding(sign, ("ddp",), ("ddp",)))


class LeavesScale(Plugin):
    """Right in steps; an evaluation leaves a factor behind, which the next backward has."""

    _factor = 1.0

    @hookimpl
    def around_forward(self, call):
        def forward(batch):
            if not torch.is_grad_enabled():
                self._factor = 2.0
                return call(batch)
            made, self._factor = call(batch) * self._factor, 1.0
            return made

        return forward


class EvaluatesOtherwise(Plugin):
    """Right in steps, and wrong by a part in a thousand in evaluations."""

    @hookimpl
    def around_forward(self, call):
        return lambda batch: call(batch) * (1.0 if torch.is_grad_enabled() else 1.001)


@pytest.mark.parametrize(
    ("made", "quantity"), [(LeavesScale, "gradients"), (EvaluatesOtherwise, "evaluation")], ids=["leaves", "is wrong"]
)
def test_evaluations_between_steps_are_looked_at(tmp_path, monkeypatch, made, quantity):
    points = {**host.installed(), "odd": EntryPoint("odd", f"{__name__}:{made.__name__}", host.GROUP)}
    monkeypatch.setattr(host, "installed", lambda: points)
    plugins, training = {**ADAMW, **TRAINING}, {"max_steps": 100}
    if quantity == "evaluation":
        assert verify(recipe(tmp_path, "ddp", plugins={**plugins, "ddp": {}, "odd": {}}, training=training)).green
    training["eval_every"] = 50
    report = verify(recipe(tmp_path, "ddp", plugins={**plugins, "ddp": {}, "odd": {}}, training=training))
    assert report.finding is not None and report.finding.plugins == ("odd",), str(report.finding)
    assert report.finding.sign.quantity == quantity
    report = verify(recipe(tmp_path, "ddp", plugins={**plugins, "ddp": {}}, training=training))
    assert report.green and report.comparison.compared["evaluation"] == 3, str(report.finding)


class TellsAndScales(Plugin):
    """A tracker that also halves gradients, as anybody may where they are final."""

    @hookimpl
    def log(self, record):
        self.last = record

    @hookimpl
    def post_reduce(self, state):
        for part in state.world.parts:
            if part.tensor.grad is not None:
                part.tensor.grad.mul_(0.5)


def test_who_tells_and_also_takes_part_in_the_step_is_compared(tmp_path, monkeypatch):
    points = {**host.installed(), "odd": EntryPoint("odd", f"{__name__}:TellsAndScales", host.GROUP)}
    monkeypatch.setattr(host, "installed", lambda: points)
    report = verify(recipe(tmp_path, "ddp", plugins={**ADAMW, **TRAINING, "ddp": {}, "odd": {}}))
    assert report.finding is not None and report.finding.plugins == ("odd",), str(report.finding)


def test_who_only_tells_is_left_out_and_its_hooks_are_told(tmp_path):
    plugins = {**ADAMW, **TRAINING, "ddp": {}, "jsonl": {}, "checkpoint": {"every_steps": 9}, "ledger": {}}
    resolved = recipe(tmp_path, "ddp", plugins=plugins)
    _, chosen, _ = small(resolved, tmp_path)
    assert chosen.left_out.keys() == {"jsonl", "checkpoint"} and "ledger" in chosen.compared
    assert says(told(resolved, tmp_path), "'jsonl'", "neither run", "close, log")
    report = verify(resolved)
    assert report.green, str(report.finding)


class ClipsAndScales(Clip):
    """Clips as the shipped plugin does, and halves gradients before: in both runs."""

    @hookimpl
    def post_reduce(self, state):
        for part in state.world.parts:
            if part.tensor.grad is not None:
                part.tensor.grad.mul_(0.5)


def test_what_both_runs_do_is_told(tmp_path, monkeypatch):
    points = {**host.installed(), "odd": EntryPoint("odd", f"{__name__}:ClipsAndScales", host.GROUP)}
    monkeypatch.setattr(host, "installed", lambda: points)
    resolved = recipe(tmp_path, "ddp")
    assert not says(told(resolved, tmp_path), "both runs share it")
    resolved = recipe(tmp_path, "ddp", plugins={**ADAMW, **TRAINING, "clip": None, "ddp": {}, "odd": {}})
    assert says(told(resolved, tmp_path), "'odd'", "post_reduce", "both runs share it")
