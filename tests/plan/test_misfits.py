"""What plugins find wrong with what ranks hold is told by ``validate``, from sizes alone, before torch is there."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest
import torch

from camshaft import Problem, hookimpl, host
from camshaft.errors import PluginError
from camshaft.models.llama import Llama
from camshaft.plugin import Plugin
from camshaft.recipe import check
from camshaft_ddp.bucket import fill

SGD = {"sgd": {"lr": 0.1}}
MODEL = {
    "vocab_size": 259, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip


def problems(make_recipe, plugins, ranks, model=None, device="any", **sections):
    resolved = make_recipe({**SGD, **plugins}, ranks, model={**MODEL, **(model or {})}, **sections)
    return check(resolved, ranks, device=device).problems


def fp8(make_recipe, degree, model=None, **options):
    plugins = {"ddp": None, "precision": {"compute": "fp8", **options}}
    if degree > 1:
        plugins["tensor_parallel"] = {}
    return problems(
        make_recipe, plugins, degree, model, launch={"device": "cuda"}, parallel={"tensor_parallel": degree}
    )


def test_layers_that_are_uneven_once_they_are_divided(make_recipe):
    assert fp8(make_recipe, 1) == ()
    (problem,) = fp8(make_recipe, 2)  # 112 = 7 * 16
    assert problem.key == "plugins.precision.fp8.keep"
    assert "'model.layers.1.mlp.gate_proj' has 64 inputs and 56 outputs on rank 0" in problem.message
    assert fp8(make_recipe, 2, {"intermediate_size": 128}) == ()
    assert fp8(make_recipe, 2, fp8={"keep": ["*mlp*", "lm_head"]}) == ()


def test_a_size_that_is_uneven_before_is_told_once(make_recipe):
    (problem,) = fp8(make_recipe, 2, {"intermediate_size": 104})
    assert "104 outputs, and" in problem.message


def test_a_stage_that_has_no_fp8_layer_is_no_fault(make_recipe):
    """The first of four stages holds the first layer alone, which is kept out."""
    plugins = {"ddp": None, "precision": {"compute": "fp8"}, "pipeline": {}}
    launch, parallel = {"device": "cuda"}, {"pipeline_parallel": 4}
    batch = {"micro_batch_size": 3, "global_batch_size": 12}
    assert problems(make_recipe, plugins, 4, launch=launch, parallel=parallel, batch=batch) == ()


@pytest.mark.parametrize("name", ["ddp", "zero"])
def test_nothing_to_overlap(make_recipe, name):
    asked = {"overlap": True, **({"stage": 1} if name == "zero" else {})}
    plugins = {"ddp": None, name: asked} if name == "zero" else {name: asked}
    (problem,) = problems(make_recipe, plugins, 2)
    assert problem.key == f"plugins.{name}.overlap" and f"lower plugins.{name}.bucket_size_mb" in problem.fix
    assert problems(make_recipe, {**plugins, name: {**asked, "bucket_size_mb": 0.1}}, 2) == ()
    del asked["overlap"]
    assert problems(make_recipe, {**plugins, name: asked}, 2) == ()


def test_several_stages_of_a_rank_have_buckets_of_their_own(make_recipe):
    batch, parallel = {"micro_batch_size": 2, "global_batch_size": 12}, {"pipeline_parallel": 2}
    pipeline = {"schedule": "interleaved_1f1b", "virtual_stages": 2}
    asked = {"ddp": {"overlap": True}, "pipeline": pipeline}
    assert problems(make_recipe, asked, 4, batch=batch, parallel=parallel) == ()
    asked["pipeline"] = {"schedule": "1f1b"}
    (problem,) = problems(make_recipe, asked, 4, batch=batch, parallel=parallel)
    assert problem.key == "plugins.ddp.overlap"


@pytest.mark.parametrize("size", [0.2, 0.5, 0.6, 0.7, 0.8, 2.0])
@pytest.mark.parametrize("layers", [3, 5, 9])
def test_buckets_are_those_of_a_run(make_recipe, size, layers):
    asked, model = {"ddp": {"overlap": True, "bucket_size_mb": size}}, {"num_hidden_layers": layers}
    found = problems(make_recipe, asked, 2, model)
    resolved = make_recipe({**SGD, **asked}, 2, model={**MODEL, **model})
    with torch.device("meta"):
        built = Llama(check(resolved, 2, device="cpu").config)
    assert bool(found) == (len(fill([*built.parameters()], int(size * 2**20))) == 1)


def test_the_smallest_buckets_are_of_one_parameter_each(make_recipe):
    asked = {"ddp": {"overlap": True, "bucket_size_mb": 1e-6}}
    assert problems(make_recipe, asked, 2) == ()


class Strange(Plugin):
    answer = "a text"

    @hookimpl
    def misfits(self, context, sizes):
        assert context.config is not None and sizes.parameters
        return [self.answer]


def test_an_answer_that_is_no_problem_names_its_plugin(make_recipe, monkeypatch):
    points = {**host.installed(), "strange": EntryPoint("strange", f"{__name__}:Strange", host.GROUP)}
    monkeypatch.setattr(host, "installed", lambda: points)
    with pytest.raises(PluginError, match=r"strange.*misfits.*must give Problems, got str"):
        problems(make_recipe, {"strange": {}}, 1)
    monkeypatch.setattr(Strange, "answer", Problem("too small", key="plugins.strange", fix="grow"))
    (problem,) = problems(make_recipe, {"strange": {}}, 1)
    assert problem.message == "too small" and problem.line is not None
    (problem,) = problems(make_recipe, {"strange": {}}, 1, {"num_key_value_heads": 3})
    assert problem.key != "plugins.strange", "nobody is asked about a recipe that is at fault already"


def test_torch_is_not_imported_for_it(make_recipe):
    resolved = make_recipe({**SGD, "ddp": {"overlap": True}}, 2, model=MODEL)
    program = (
        "import sys; from camshaft.cli import run; "
        f"status = run(['validate', {str(resolved.path)!r}, '--world-size', '2']); "
        "sys.exit(10 * ('torch' in sys.modules) + status)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "plugins.ddp.overlap" in done.stderr, done.stderr
