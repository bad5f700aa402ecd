"""Before anything is built: options, refusals, bytes, and the configuration that DeepSpeed gets."""

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from deepspeed_cases import plugins

from camshaft.errors import MachineError, RecipeError
from camshaft.plugin import Plugin, hookimpl
from camshaft.recipe import check
from camshaft.state import BatchPlan, Policy
from camshaft.testing.ranks import RankFailed
from camshaft.testing.run import record_rank, record_ranks
from camshaft_deepspeed import Options
from camshaft_deepspeed import options as options_module
from camshaft_deepspeed.bytes import estimate
from camshaft_deepspeed.config import deepspeed_config, effective, write

FP32 = Policy(torch.float32, torch.float32, torch.float32, torch.float32)
BATCH = BatchPlan(micro_batch_size=2, global_batch_size=12, accumulation=3)


def problems(resolved, world_size=2):
    return check(resolved, world_size, device="cpu").problems


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_is_legal_with_the_plugins_of_other_rows(make_recipe, stage):
    chosen = {**plugins(stage), "checkpoint": {"every_steps": 2}, "jsonl": {}, "console": {}}
    assert problems(make_recipe(chosen, 2)) == ()


@pytest.mark.parametrize(("device", "count"), [("cpu", 1), ("cuda", 1), ("any", 0)])
def test_where_it_is_not_installed(make_recipe, monkeypatch, device, count):
    """On this machine, that is: another one may well have it."""

    def absent(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(options_module, "version", absent)
    found = check(make_recipe(plugins(2), 2), 2, device=device).problems
    assert [problem.message for problem in found] == ["DeepSpeed is not installed"] * count
    assert all(problem.key == "plugins.deepspeed" and "plugins.zero" in problem.fix for problem in found)


@pytest.mark.parametrize(
    ("options", "key", "fix"),
    [
        ({"stage": 2, "offload_parameters": "cpu"}, "offload_parameters", "stage=3"),
        ({"stage": 0, "overlap_comm": True}, "overlap_comm", "remove it"),
        ({"stage": 0, "offload_optimizer": "cpu"}, "offload_optimizer", "stage=3"),
        ({"stage": 1, "prefetch_bucket_size": 10}, "prefetch_bucket_size", "stage=3"),
        ({"stage": 3, "allgather_bucket_size": 10}, "allgather_bucket_size", "stage=2"),
        ({"stage": 2, "offload_optimizer": "nvme", "nvme_path": "disk"}, "offload_optimizer", "=cpu"),
        ({"stage": 3, "offload_optimizer": "nvme", "nvme_path": "disk"}, "offload_optimizer", "=cpu"),
        ({"stage": 3, "offload_parameters": "nvme"}, "nvme_path", "nvme_path="),
        ({"stage": 3, "nvme_path": "disk"}, "nvme_path", "remove it"),
        ({"stage": 1, "pin_memory": True}, "pin_memory", "remove it"),
    ],
)
def test_options_that_contradict_each_other(make_recipe, options, key, fix):
    chosen = plugins(**options, **({"reduce_bucket_size": None} if options["stage"] == 0 else {}))
    (problem,) = problems(make_recipe(chosen, 2))
    assert problem.key == f"plugins.deepspeed.{key}" and fix in problem.fix


@pytest.mark.parametrize(
    "options", [{"stage": 4}, {"stage": 2, "reduce_bucket": 5}, {"stage": 2, "reduce_bucket_size": 0}]
)
def test_unknown_and_impossible_options_are_refused(make_recipe, options):
    with pytest.raises(RecipeError, match=r"plugins\.deepspeed"):
        make_recipe({**plugins(), "deepspeed": options}, 2)


@pytest.mark.parametrize("axis", ["tensor_parallel", "pipeline_parallel", "context_parallel"])
def test_other_axes_are_refused(make_recipe, axis):
    found = problems(make_recipe(plugins(1), 1, accumulation=1, parallel={axis: 2}), 2)
    mine = [problem for problem in found if "DeepSpeed" in problem.message]
    assert [problem.key for problem in mine] == [f"parallel.{axis}"] and f"parallel.{axis}=1" in mine[0].fix


def test_hybrid_sharding_is_refused(make_recipe):
    (problem,) = problems(make_recipe(plugins(3), 4, parallel={"data_parallel_shard": 2}), 4)
    assert problem.key == "parallel.data_parallel_shard" and "plugins.zero" in problem.fix


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_fp64_is_refused(make_recipe, stage):
    (problem,) = problems(make_recipe(plugins(stage, precision={"compute": "fp64"}), 2))
    assert problem.key == "plugins.precision.compute" and "compute=fp32" in problem.fix


def test_fp16_parameters_are_refused_where_deepspeed_would_scale_the_loss_itself(make_recipe):
    precision = {"compute": "fp16", "parameters": "fp16"}
    (problem,) = problems(make_recipe(plugins(2, precision=precision), 2))
    assert problem.key == "plugins.precision.parameters"
    assert problems(make_recipe(plugins(0, precision=precision), 2)) == ()


def test_what_the_bf16_optimizer_of_stage_1_ignores_is_refused(make_recipe):
    precision = {"compute": "bf16", "parameters": "bf16", "gradients": "fp32"}
    found = problems(make_recipe(plugins(1, precision=precision, overlap_comm=True), 2))
    assert {problem.key.rpartition(".")[2] for problem in found} == {"overlap_comm", "reduce_bucket_size"}


@pytest.mark.parametrize(("name", "options"), [("muon", {"lr": 0.02}), ("lamb", {"lr": 1e-3})])
def test_optimizers_that_need_whole_parameters(make_recipe, name, options):
    def recipe(stage):
        return make_recipe({**plugins(stage), "adamw": None, name: options}, 2)

    assert any(problem.key == f"plugins.{name}" or name in problem.message for problem in problems(recipe(1)))
    assert problems(recipe(0)) == (), "stage 0 lays out nothing that the optimizer updates"


def test_two_owners_of_gradients_are_refused(make_recipe):
    found = problems(make_recipe({**plugins(1), "ddp": {}}, 2))
    assert any("'ddp'" in problem.message and "'deepspeed'" in problem.message for problem in found)


def test_one_data_rank_by_the_recipe_has_nothing_to_divide(make_recipe):
    (problem,) = problems(make_recipe(plugins(2), 1, parallel={"data_parallel": 1}), 1)
    assert problem.key == "plugins.deepspeed"
    assert problems(make_recipe(plugins(2), 1), 1) == ()
    offloaded = plugins(2, offload_optimizer="cpu")
    assert problems(make_recipe(offloaded, 1, parallel={"data_parallel": 1}), 1) == ()


class Wide(Plugin):
    """Owns ``precision`` with fp64, which no plan has told."""

    @hookimpl
    def precision(self):
        return Policy(torch.float64, torch.float64, torch.float64, torch.float64)


def test_fp64_of_a_stranger_is_refused_when_it_shows(make_recipe):
    resolved = make_recipe({**plugins(1), "precision": None}, 1)
    with pytest.raises(RankFailed, match="DeepSpeed has no fp64"):
        record_ranks(resolved, 1, {"wide": Wide()})


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_reads_its_written_configuration_back(tmp_path, stage):
    options = Options(stage=stage, **({"reduce_bucket_size": 3000} if stage else {}))
    config = deepspeed_config(options, FP32, BATCH, gpu=False, disk=None)
    written = json.loads(write(config, tmp_path / "run").read_text())
    zero = written["zero_optimization"]
    assert zero["stage"] == stage and effective(written) == written, "defaults are filled in once"
    assert written["gradient_allreduce_op"] == ("mean" if stage == 3 else "sum")
    assert written["gradient_clipping"] == 0.0 and zero["reduce_bucket_size"] == (3000 if stage else 500_000_000)
    assert not zero["memory_efficient_linear"] if stage == 3 else True
    assert {"stage3_prefetch_bucket_size", "overlap_comm", "contiguous_gradients"} <= zero.keys()


def test_every_option_reaches_deepspeed_under_its_own_name():
    options = Options(
        stage=3,
        offload_optimizer="cpu",
        offload_parameters="nvme",
        nvme_path="disk",
        pin_memory=False,
        overlap_comm=False,
        contiguous_gradients=False,
        reduce_scatter=False,
        reduce_bucket_size=11,
        prefetch_bucket_size=12,
        persistence_threshold=13,
        max_live_parameters=14,
        max_reuse_distance=15,
        sub_group_size=16,
    )
    narrow = Policy(torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32, torch.float32)
    config = effective(deepspeed_config(options, narrow, BATCH, gpu=True, disk="disk"))
    zero = config["zero_optimization"]
    names = ("overlap_comm", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "sub_group_size")
    assert [zero[name] for name in names] == [False, False, False, 11, 16]
    stage3 = ("prefetch_bucket_size", "param_persistence_threshold", "max_live_parameters", "max_reuse_distance")
    assert [zero[f"stage3_{name}"] for name in stage3] == [12, 13, 14, 15]
    assert zero["offload_optimizer"]["device"] == "cpu" and not zero["offload_optimizer"]["pin_memory"]
    assert zero["offload_param"]["device"] == "nvme" and zero["offload_param"]["nvme_path"] == "disk"
    assert config["bf16"]["enabled"] and config["communication_data_type"] == "bf16"
    assert config["data_types"]["grad_accum_dtype"] == "fp32"
    assert config["train_batch_size"] == 12 and config["gradient_accumulation_steps"] == 3


def test_nvme_needs_an_extension_and_says_which(make_recipe, tmp_path, monkeypatch):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: False)
    chosen = plugins(3, offload_parameters="nvme", nvme_path=str(tmp_path / "disk"))
    resolved = make_recipe(chosen, 1)
    assert problems(resolved, 1) == ()
    with pytest.raises(MachineError, match="libaio-dev"):
        record_rank(0, 1, resolved)
    assert not torch.distributed.is_initialized(), "the process group of one rank is left"
    written = json.loads((tmp_path / "run1" / "deepspeed.json").read_text())
    assert written["zero_optimization"]["offload_param"]["device"] == "nvme"


def test_planning_imports_neither_deepspeed_nor_torch():
    code = (
        "import sys, camshaft_deepspeed as d; d.Options(stage=3); import camshaft_deepspeed.bytes;"
        "assert not {'torch', 'deepspeed'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_bytes_are_those_of_the_formulas(make_recipe):
    from camshaft.claims import Widths
    from camshaft.estimate import Sizes

    narrow = Widths(param=2, gradient=2, reduce=2, master=4)
    sizes = Sizes(elements=1000, trained=1000, accumulation=4, widths=narrow, moments=2, parameters=None)
    totals = [estimate(Options(stage=stage), sizes, 4).state.total for stage in range(4)]
    assert totals == [16_000, 4_000 + 3_000, 2_000 + 500 + 3_000, 500 + 500 + 3_000]
    sent = [sum(entry.bytes for entry in estimate(Options(stage=stage), sizes, 4).sent) for stage in range(4)]
    assert sent == [3_000, 4_500, 4 * 3_000 + 1_500, 4 * 1_500 + 8 * 1_500]
    single = Sizes(1000, 1000, 1, Widths(), 2, None)
    assert estimate(Options(stage=1), single, 1).state.masters == 4_000, "masters beside fp32 parameters too"
