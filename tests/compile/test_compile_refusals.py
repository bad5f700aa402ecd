"""What cannot be compiled is refused before anything runs, with a fix."""

import os
import sysconfig
from importlib.metadata import EntryPoint, entry_points

import pytest
import torch
from compile_cases import TRACED, recipe, run
from torch import nn

from camshaft import host
from camshaft.errors import RecipeError
from camshaft.models.llama import Llama
from camshaft.plugin import Plugin, hookimpl
from camshaft.recipe import check
from camshaft.testing.ranks import RankFailed
from camshaft_compile import Options, naming, rules
from camshaft_compile.blocks import arguments, chosen


def problems(resolved, ranks=1, device="cpu"):
    return [str(problem) for problem in check(resolved, ranks, device=device).problems]


PIPELINE = {"parallel": {"pipeline_parallel": 2}}
REFUSED = {
    "no cuda": (1, {"cuda_graphs": True}, {}, {}, "this run is on a CPU", "cuda_graphs=false"),
    "no inductor": (1, {**TRACED, "mode": "default"}, {}, {}, "only inductor reads 'mode'", "backend=inductor"),
    "zero bubble": (2, TRACED, {"pipeline": {"schedule": "zb_h1"}}, PIPELINE, "weight products", "schedule=1f1b"),
    "deepspeed 3": (2, TRACED, {"ddp": None, "deepspeed": {"stage": 3}}, {}, "hooks on every module", "stage=2"),
    "async": (
        2,
        TRACED,
        {"tensor_parallel": {"sequence_parallel": True, "async": True}},
        {"parallel": {"tensor_parallel": 2}},
        "between products",
        "async=false",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_validate_says_what_and_how_to_change_it(case, make_recipe):
    ranks, options, plugins, sections, reason, fix = REFUSED[case]
    compute = "fp32" if case.startswith("deepspeed") else "fp64"
    found = problems(recipe(make_recipe, ranks, options, plugins=plugins, compute=compute, **sections), ranks)
    assert len(found) == 1 and reason in found[0] and fix in found[0], found


def test_cuda_graphs_are_refused_where_shapes_change_or_microbatches_overlap(make_recipe):
    for options, sections, reason in (
        ({"cuda_graphs": True, "dynamic": True}, {}, "one shape"),
        ({"cuda_graphs": True}, PIPELINE, "several microbatches"),
        ({"cuda_graphs": True, "mode": "max-autotune-no-cudagraphs"}, {}, "says that there are no CUDA graphs"),
    ):
        plugins = {"pipeline": {"schedule": "1f1b"}} if sections else {}
        resolved = recipe(make_recipe, 2 if sections else 1, options, plugins=plugins, **sections)
        found = [each for each in problems(resolved, 2 if sections else 1, "any") if "cuda_graphs" in each]
        assert len(found) == 1 and reason in found[0]


@pytest.mark.parametrize(
    ("kernels", "data", "refused"),
    [
        ({"all": "auto"}, {}, True),
        ({"document_attention": "torch_varlen"}, {}, True),
        ({"all": "auto", "document_attention": "torch"}, {}, False),
        ({"linear_cross_entropy": "torch"}, {}, False),
        (None, {}, False),
        ({"all": "auto"}, {"document_mask": False}, False),
        ({"all": "auto"}, {"pack": False}, False),
    ],
)
def test_cuda_graphs_are_refused_where_each_batch_has_other_bounds_of_documents(kernels, data, refused, make_recipe):
    whole = {**recipe(make_recipe, 1).tree["data"], "pack": True, "document_mask": True, **data}
    sections = {"data": whole, "batch": {"global_batch_size": 8, "micro_batch_size": 8}}
    plugins = {} if kernels is None else {"kernels": kernels}
    resolved = recipe(make_recipe, 1, {"cuda_graphs": True}, plugins=plugins, **sections)
    found = [each for each in problems(resolved, 1, "any") if "plugins.compile.cuda_graphs:" in each]
    assert len(found) == refused and all("document_attention=torch" in each for each in found), found


@pytest.mark.parametrize(
    ("batch", "refused"),
    [
        ({"micro_batch_size": 8}, False),
        ({"micro_batch_size": 4}, True),
        ({"micro_batch_size": 4, "ranks": 2}, False),
        ({"micro_batch_size": 8, "on_out_of_memory": "halve"}, True),
    ],
    ids=["one", "two", "two ranks", "halves"],
)
def test_cuda_graphs_are_refused_where_gradients_of_microbatches_add_up(batch, refused, make_recipe):
    """A replay would write over the gradient of the microbatch before, which nothing on a CPU shows."""
    ranks, batch = batch.get("ranks", 1), {key: value for key, value in batch.items() if key != "ranks"}
    resolved = recipe(make_recipe, ranks, {"cuda_graphs": True}, batch={"global_batch_size": 8, **batch})
    found = [each for each in problems(resolved, ranks, "any") if "cuda_graphs" in each]
    assert len(found) == refused and all("next microbatch's replay" in each for each in found), found


def test_a_machine_without_a_compiler_is_told_so(make_recipe, monkeypatch, tmp_path):
    resolved = recipe(make_recipe, 1, {})
    assert problems(resolved) == []
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    (found,) = problems(resolved)
    assert "C++ compiler" in found and "'g++'" in found and "plugins.compile=null" in found
    assert problems(resolved, device="any") == []
    tool = tmp_path / "c++"
    tool.write_text("#!/bin/sh\n")
    os.chmod(tool, 0o755)
    monkeypatch.setenv("CXX", str(tool))
    assert problems(resolved) == []
    assert "C compiler" in rules.missing_tools("cuda")
    with pytest.raises(RecipeError):
        monkeypatch.delenv("CXX")
        check(resolved, 1, device="cpu").require()


def test_a_python_without_headers_is_told_so(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert "Python.h" in rules.missing_tools("cpu")


class Tree(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2))


def test_modules_are_chosen_by_globs_of_levels():
    assert chosen(Options(modules=["blocks.*"]), Tree(), "k") == ["blocks.0", "blocks.1"]
    assert chosen(Options(modules=["blocks.*.0"]), Tree(), "k") == ["blocks.0.0", "blocks.1.0"]
    for modules, reason in (
        (["block.*"], "matches no module"),
        (["blocks.0", "blocks.0.1"], "inside of"),
        (["blocks"], "matches no module"),
        ([], "does not tell what its layers are"),
    ):
        with pytest.raises(RecipeError, match=reason):
            chosen(Options(modules=modules), Tree(), "k")


def test_options_reach_torch():
    assert arguments(Options(cuda_graphs=True))["mode"] == "reduce-overhead"
    assert arguments(Options())["mode"] == "default"
    assert "mode" not in arguments(Options(backend="eager"))
    assert arguments(Options(), whole=True)["fullgraph"] and not arguments(Options())["fullgraph"]


class Late(Plugin):
    """Puts a hook inside of a compiled layer."""

    @hookimpl
    def bind(self, state):
        state.model.model.layers[1].mlp.register_forward_hook(lambda *_: None)


def test_hooks_that_come_later_are_refused(make_recipe):
    with pytest.raises(RankFailed, match=r"hook or a forward on 'model.layers.1.mlp'"):
        run(recipe(make_recipe, 1, TRACED), 1, {"late": Late()})


def test_units_inside_of_a_compiled_layer_are_refused(make_recipe):
    plugins = {"ddp": None, "zero": {"stage": 3, "units": ["model.layers.*.mlp"]}}
    with pytest.raises(RankFailed, match=r"is a unit inside of 'model.layers.0'"):
        run(recipe(make_recipe, 2, TRACED, plugins=plugins), 2)


def test_one_graph_or_none_with_fullgraph(make_recipe):
    resolved = recipe(make_recipe, 1, {"backend": "aot_eager", "fullgraph": True})
    with pytest.raises(RankFailed, match=r"(?s)cannot be compiled as one graph.*fullgraph=false"):
        run(resolved, 1, {"broken": Breaking()})


class Breaking(Plugin):
    """Owns ``build_model``: a layer breaks its graph."""

    @hookimpl
    def build_model(self, config, world):
        model = Llama(config, world.ops)
        model.model.layers[0].mlp.register_forward_pre_hook(_break)
        return model


def _break(module, arguments):
    torch._dynamo.graph_break()


@pytest.mark.parametrize("end", [{"max_steps": 1}, {"max_tokens": 8 * 32}])
def test_one_step_compiles_nothing(make_recipe, end):
    (found,) = problems(recipe(make_recipe, 1, TRACED, training={"log_every": 1, **end}))
    assert "the run has one step, which is never compiled" in found and "plugins.compile=null" in found
    assert problems(recipe(make_recipe, 1, TRACED, training={"max_tokens": 8 * 32 + 1})) == []


def test_an_unknown_backend_is_refused_with_those_that_there_are(make_recipe):
    (found,) = problems(recipe(make_recipe, 1, {"backend": "inductr"}))
    assert "compile.backend" in found and "no backend 'inductr'; there are: aot_eager" in found and "Fix: set" in found
    resolved = recipe(make_recipe, 1, {"backend": "tvm"})
    (found,) = problems(resolved)
    assert "needs the package tvm, which is not installed" in found


def test_a_backend_that_another_package_may_register_is_looked_for_at_build(make_recipe, monkeypatch):
    points = {**host.installed(), "odd": EntryPoint("odd", f"{__name__}:Late", host.GROUP)}
    monkeypatch.setattr(host, "installed", lambda: points)
    monkeypatch.setattr(naming, "installed", lambda: points)
    resolved = recipe(make_recipe, 1, {"backend": "theirs"}, plugins={"odd": {}})
    assert not any("backend" in each for each in problems(resolved))
    with pytest.raises(RankFailed, match=r"no backend 'theirs'; there are: .*inductor"):
        run(resolved, 1)


class Builds(Plugin):
    """Owns ``build_model``."""

    @hookimpl
    def build_model(self, config, world):
        return Llama(config, world.ops)


def test_the_backends_of_torch_are_those_that_it_lists():
    tested = {
        name
        for name in torch.compiler.list_backends(exclude_tags=())
        if name.endswith("_TESTING_ONLY") or "minifier" in name
    }
    others = {point.name for point in entry_points(group=naming.GROUP)}
    listed = set(torch.compiler.list_backends(exclude_tags=()))
    assert listed - tested - others == naming.TORCHS_OWN - others


NAMED = {
    "modules.1": (["model.layers.*.mlp", "model.layer.*"], "the pattern 'model.layer.*' matches no module"),
    "modules": (["model.layers.1", "model.layers.*.mlp"], "'model.layers.1.mlp' is inside of 'model.layers.1'"),
}


@pytest.mark.parametrize("key", NAMED)
@pytest.mark.parametrize("stages", [1, 2])
def test_modules_of_the_built_in_decoder_are_looked_for_before_a_run(make_recipe, key, stages):
    modules, message = NAMED[key]
    sections = {"plugins": {"ddp": None, "pipeline": {}}, "parallel": {"pipeline_parallel": 2}} if stages > 1 else {}
    resolved = recipe(make_recipe, stages, {**TRACED, "modules": modules}, **sections)
    (found,) = check(resolved, stages, device="cpu").problems
    assert found.key == f"plugins.compile.{key}" and message in found.message and found.line and found.fix
    assert check(resolved, stages, device="cpu", observers={"builds": Builds()}).problems == ()


def test_a_pattern_of_one_stage_is_no_fault_of_the_other(make_recipe):
    options = {**TRACED, "modules": ["model.layers.0", "model.layers.2.mlp"]}
    sections = {"plugins": {"ddp": None, "pipeline": {}}, "parallel": {"pipeline_parallel": 2}}
    assert len(run(recipe(make_recipe, 2, options, **sections), 2)) == 4


def test_a_cache_that_is_a_file(make_recipe, tmp_path):
    (tmp_path / "file").write_text("")
    (found,) = problems(recipe(make_recipe, 1, {"cache_dir": str(tmp_path / "file")}))
    assert "is no folder" in found and "compile.cache_dir" in found
