"""Every combination of what divides a run is legal, or refused with both plugins named and a fix: no third outcome.

Pure claims, as ``camshaft validate`` checks them. That the legal ones train the numbers of one process is shown by the
parity matrix.
"""

import time
from itertools import product

import pytest
import yaml

from camshaft.cli import run
from camshaft.errors import RecipeError
from camshaft.recipe import check, load

DATA = {
    "none": {},
    "ddp": {"ddp": {}},
    "zero 1": {"zero": {"stage": 1}},
    "zero 2": {"zero": {"stage": 2}},
    "zero 3": {"zero": {"stage": 3}},
    "hybrid 1": {"zero": {"stage": 1}},
    "hybrid 3": {"zero": {"stage": 3}},
    "torch 2": {"zero": {"stage": 2, "provider": "torch"}},
    "torch 3": {"zero": {"stage": 3, "provider": "torch"}},
    **{f"deepspeed {stage}": {"deepspeed": {"stage": stage}} for stage in range(4)},
}
TENSOR = {
    "-": {},
    "tp": {"tensor_parallel": {}},
    "tp + sp": {"tensor_parallel": {"sequence_parallel": True}},
}
SCHEDULES = ("gpipe", "1f1b", "interleaved_1f1b", "zb_h1", "zbv", "dualpipe_v")
PIPELINE = {"-": {}, **{name: {"pipeline": {"schedule": name}} for name in SCHEDULES}}
OPTIMIZERS = ("adamw", "sgd", "lion", "adafactor", "lamb", "muon")
PRECISIONS = {
    "fp32": {},
    "fp64": {"precision": {"compute": "fp64"}},
    "bf16": {"precision": {"compute": "bf16"}},
    "bf16 parameters": {"precision": {"compute": "bf16", "parameters": "bf16", "gradients": "fp32"}},
    "fp16": {"precision": {"compute": "fp16"}},
    "fp16 parameters": {"precision": {"compute": "fp16", "parameters": "fp16"}},
}

RECIPE = {
    "schema_version": 1,
    "name": "table",
    "model": {"preset": "llama-tiny"},
    "tokenizer": {"type": "byte"},
    "data": {"sequence_length": 32},
    "batch": {"micro_batch_size": 1, "global_batch_size": 16},
    "training": {"max_steps": 4},
}
LIBRARIES = ("torch", "deepspeed")


def reasons(data, tensor, pipeline, optimizer, precision):
    """Words of the refusals that must come, each with both sides; none where the combination is legal."""
    library, stage = data.split()[0], data[-1]
    dividing = [name for name, on in (("tensor_parallel", tensor), ("pipeline", pipeline)) if on != "-"]
    found = []
    if library in LIBRARIES:
        found += [("zero" if library == "torch" else "deepspeed", name) for name in dividing]
    if library == "deepspeed":
        if stage != "0" and optimizer in ("adafactor", "lamb", "muon"):
            found.append(("deepspeed", optimizer))
        if precision == "fp64":
            found.append(("deepspeed", "fp64"))
        if stage != "0" and precision == "fp16 parameters":
            found.append(("deepspeed", "fp16"))
    return found


def write(folder, data, tensor="-", pipeline="-", optimizer="adamw", precision="fp32"):
    ranks = 1 if data == "none" else 4
    parallel = {"tensor_parallel": 1 + (tensor != "-"), "pipeline_parallel": 1 + (pipeline != "-")}
    if data.startswith("hybrid"):
        parallel["data_parallel_shard"] = 2
    chosen = [DATA[data], TENSOR[tensor], PIPELINE[pipeline], {optimizer: {"lr": 1e-3}}, PRECISIONS[precision]]
    plugins = {name: options for part in chosen for name, options in part.items()}
    processes = ranks * parallel["tensor_parallel"] * parallel["pipeline_parallel"]
    tree = {**RECIPE, "parallel": parallel, "launch": {"processes": processes}}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**tree, "plugins": plugins}, sort_keys=False))
    return path


def judge(path, expected):
    """Check the recipe against ``expected``: what is refused names both sides and a fix."""
    problems = check(load(path)).problems
    told = [str(problem) for problem in problems]
    assert bool(told) == bool(expected), (expected, told)
    assert all(problem.fix and problem.key for problem in problems)
    for sides in expected:
        assert any(all(side in text for side in sides) for text in told), (sides, told)


@pytest.mark.parametrize("data", DATA)
def test_triples_of_what_divides(tmp_path, data):
    """Data-parallel family x tensor and sequence parallel x each schedule."""
    for tensor, pipeline in product(TENSOR, PIPELINE):
        chosen = (data, tensor, pipeline, "adamw", "fp32")
        judge(write(tmp_path, *chosen), reasons(*chosen))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers_with_what_divides(tmp_path, optimizer):
    for data, tensor, pipeline in product(DATA, TENSOR, ("-", "zbv")):
        chosen = (data, tensor, pipeline, optimizer, "fp32")
        judge(write(tmp_path, *chosen), reasons(*chosen))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precisions_with_what_divides(tmp_path, precision):
    for data, tensor, pipeline in product(DATA, TENSOR, ("-", "interleaved_1f1b")):
        chosen = (data, tensor, pipeline, "adamw", precision)
        judge(write(tmp_path, *chosen), reasons(*chosen))


PAIRS = {
    "two storages": (("ddp", "zero 1"), ("ddp", "zero", "gradient.reduce@dp")),
    "storage and a library": (("zero 2", "deepspeed 2"), ("zero", "deepspeed", "gradient.reduce@dp")),
    "ddp and a library": (("ddp", "deepspeed 1"), ("ddp", "deepspeed", "gradient.reduce@dp")),
}


@pytest.mark.parametrize(("names", "words"), PAIRS.values(), ids=PAIRS)
def test_two_members_of_the_family_are_refused_with_both_named(tmp_path, names, words):
    path = write(tmp_path, names[0], "tp", "1f1b")
    tree = yaml.safe_load(path.read_text())
    tree["plugins"] |= DATA[names[1]]
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    told = [str(problem) for problem in check(load(path)).problems]
    assert any(all(word in text for word in words) and "Fix: remove one of them" in text for text in told), told


@pytest.mark.parametrize(
    ("axis", "plugin", "line"),
    [
        ("tensor_parallel", "tensor_parallel", "plugins.tensor_parallel: {}"),
        ("pipeline_parallel", "pipeline", "plugins.pipeline: {}"),
    ],
)
def test_a_degree_without_its_plugin_and_a_plugin_without_its_degree(tmp_path, axis, plugin, line):
    path = write(tmp_path, "ddp")
    (problem,) = check(load(path, [f"parallel.{axis}=2"])).problems
    assert problem.key == f"parallel.{axis}" and "no enabled plugin claims it" in problem.message
    assert line in problem.fix and f"parallel.{axis}=1" in problem.fix
    (problem,) = check(load(path, [f"plugins.{plugin}={{}}"])).problems
    assert (
        problem.key == f"plugins.{plugin}" and f"parallel.{axis}=2" in problem.fix and f"'{plugin}'" in problem.message
    )


@pytest.mark.parametrize(
    ("change", "home"),
    [("tensor_parallel=2", "parallel.tensor_parallel"), ("tensor_parallel={}", "plugins.tensor_parallel")],
)
def test_a_name_that_is_a_degree_and_a_plugin_is_told_by_its_value(tmp_path, change, home):
    with pytest.raises(RecipeError, match=f"it belongs to '{home.split('.')[0]}'. Fix: set {home} instead"):
        load(write(tmp_path, "ddp"), [change])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (("parallel.tensor_parallel=3",), "4 processes cannot be divided by pp 1 x cp 1 x tp 3 = 3"),
        (
            ("parallel.data_parallel=3", "parallel.tensor_parallel=2"),
            "dp 3 x pp 1 x cp 1 x tp 2 = 6, but the run has 4",
        ),
        (("parallel.context_parallel=2",), "axis 'cp' has degree 2, and no enabled plugin claims it"),
    ],
)
def test_degrees_that_do_not_multiply_are_told_with_the_product(tmp_path, changes, words):
    problems = check(load(write(tmp_path, "ddp"), changes)).problems
    assert any(words in problem.message and problem.fix for problem in problems), problems


def test_validate_tells_a_refusal_in_under_a_second(tmp_path, capsys):
    path = write(tmp_path, "torch 3", "tp + sp", "interleaved_1f1b", "muon", "bf16 parameters")
    began = time.process_time()
    assert run(["validate", str(path)]) == 2
    assert time.process_time() - began < 1
    told = capsys.readouterr().err
    assert "'zero'" in told and "tensor_parallel" in told and "pipeline" in told and "Fix:" in told
