"""What happens around the steps: evaluation, tied copies over many steps, drawings, other dtypes, a rank that fails."""

import json
import time

import pipeline_runs as runs
import pytest
import torch

from camshaft.plugin import Plugin, hookimpl
from camshaft.testing.ranks import RankFailed
from camshaft.testing.run import record_ranks

pytestmark = pytest.mark.broad


class Records(Plugin):
    """Collects evaluation records into a file of rank 0."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    @hookimpl
    def log(self, state, record):
        if state.world.is_main:
            with open(self.path, "a") as file:
                file.write(json.dumps(dict(record)) + "\n")


@pytest.mark.parametrize("schedule", ["1f1b", "zbv", "interleaved_1f1b"])
def test_evaluation_and_metrics_are_those_of_one_process(make_recipe, tmp_path, schedule):
    """21 of the evaluation's samples in batches of 2: the last batch is smaller, and follows another training step."""
    sections = {
        "training": {"max_steps": 4, "log_every": 1, "eval_every": 2, "eval_samples": 21},
        "batch": {"micro_batch_size": 2, "global_batch_size": 8},
    }
    found = []
    for world_size, options in ((1, None), (2, {"schedule": schedule})):
        resolved = runs.recipe(make_recipe, world_size, options, **sections)
        data = resolved.tree["data"] | {"validation_fraction": 0.2}
        resolved = runs.recipe(make_recipe, world_size, options, data=data, **sections)
        path = tmp_path / f"records{world_size}"
        record_ranks(resolved, world_size, {"records": Records(str(path))})
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found.append([{k: v for k, v in line.items() if not k.startswith(("perf/", "memory/"))} for line in lines])
    assert sum("eval/loss" in line for line in found[0]) >= 2 and len(found[0]) >= 6
    for one, other in zip(*found, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert other[key] == pytest.approx(value, rel=1e-12), key


class Tied(Plugin):
    """Keeps the bytes of the table: the owner's before the step, the borrower's in use during it."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    @hookimpl
    def post_reduce(self, state):
        model, rank = state.model, state.world.rank
        if hasattr(model.model, "embed_tokens"):
            torch.save(model.model.embed_tokens.weight.detach(), f"{self.folder}/owner{state.step}")
        if hasattr(model, "lm_head"):
            copy = model.lm_head.weight
            assert not isinstance(copy, torch.nn.Parameter) and "lm_head.weight" not in state.world.stages
            torch.save(copy.detach(), f"{self.folder}/borrower{state.step}")
        assert rank in (0, 1)


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_tied_copies_are_bit_equal_over_fifty_steps(make_recipe, tmp_path, schedule):
    sections = {"training": {"max_steps": 50, "log_every": 10}, "model": {"num_hidden_layers": 4}}
    resolved = runs.recipe(make_recipe, 2, {"schedule": schedule}, **sections)
    record_ranks(resolved, 2, {"tied": Tied(str(tmp_path))})
    tables = []
    for step in range(50):
        owner, borrower = (torch.load(tmp_path / f"{side}{step}") for side in ("owner", "borrower"))
        assert torch.equal(owner, borrower)
        tables.append(owner)
    assert not torch.equal(tables[0], tables[-1])


def test_the_drawings_of_a_measured_step(make_recipe):
    resolved = runs.recipe(make_recipe, 2, {"schedule": "zb_h1", "trace": True})
    record_ranks(resolved, 2)
    folder = resolved.recipe.run.dir
    with open(f"{folder}/pipeline.trace.json") as file:
        events = json.load(file)["traceEvents"]
    measured = [event for event in events if event["ph"] == "X" and event["pid"] == 1]
    assert len(measured) == 2 * 8 * 3 and {event["tid"] for event in measured} == {0, 1}
    assert all(event["dur"] > 0 for event in measured)
    with open(f"{folder}/pipeline.svg") as file:
        assert file.read().startswith("<svg")


PRECISION = {
    "autocast": {"compute": "bf16"},
    "bf16-parameters": {"compute": "bf16", "parameters": "bf16"},
    "bf16-parameters-fp32-sums": {"compute": "bf16", "parameters": "bf16", "gradients": "fp32"},
    "fp16": {"compute": "fp16", "initial_loss_scale": 1024.0},
}
NARROW = {"loss": 1e-3, "norm": 5e-3, "weights": 1e-2}


@pytest.mark.parametrize("schedule", ["zb_h1", "zbv"])
@pytest.mark.parametrize("name", PRECISION)
def test_other_dtypes(make_recipe, name, schedule):
    chosen = {"plugins": {"precision": PRECISION[name]}}
    resolved = runs.recipe(make_recipe, 1, **chosen)
    one = record_ranks(resolved, 1)[0]
    ranks = record_ranks(runs.recipe(make_recipe, 2, {"schedule": schedule}, **chosen), 2)
    runs.assert_within(runs.compare(ranks[0], one), NARROW)
    runs.assert_bit_equal(*ranks)
    assert ranks[0][-1].weights["model.norm.weight"].dtype == torch.float32, "masters are wide"


class Fails(Plugin):
    """Rank 1 raises in the third step's third microbatch."""

    @hookimpl
    def pre_forward(self, state):
        if state.world.rank == 1 and state.step == 2 and state.microbatch == 2:
            raise OSError("the disk is gone")


def test_a_rank_that_fails_ends_the_others(make_recipe):
    began = time.monotonic()
    with pytest.raises(RankFailed, match=r"(?s)the disk is gone.*") as failure:
        record_ranks(runs.recipe(make_recipe, 2, {}), 2, {"fails": Fails()})
    assert time.monotonic() - began < 20 and "rank 0" in str(failure.value)
