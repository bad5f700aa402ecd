"""Gradients, weights and everything else with recomputation are in every bit what they are without."""

import json

import pytest
import torch
from recompute_cases import ADAMW, FULL, MODES, SELECTIVE, Wet, assert_same, recipe, train

from camshaft.data import prepare
from camshaft.models.llama import Llama
from camshaft.plugin import Plugin, hookimpl
from camshaft.testing.compare import assert_within, compare
from camshaft.testing.reference import plain_run
from camshaft.testing.run import record_ranks
from camshaft_recompute import ambient

pytestmark = pytest.mark.broad


@pytest.fixture(scope="module")
def plain():
    """Records without recomputation by settings, each made once."""
    made = {}

    def find(make_recipe, key, *arguments, **settings):
        if key not in made:
            made[key] = train(make_recipe, *arguments, **settings)
        return made[key]

    return find


@pytest.mark.parametrize("mode", MODES)
def test_one_process_with_dropout_and_accumulation(make_recipe, plain, mode):
    assert_same(train(make_recipe, 1, MODES[mode]), plain(make_recipe, "one"))


NARROW = {
    "bf16": {"compute": "bf16"},
    "bf16 parameters": {"compute": "bf16", "parameters": "bf16"},
    "fp16": {"compute": "fp16"},
}


@pytest.mark.parametrize("mode", ["full", "selective", "budget", "offload"])
@pytest.mark.parametrize("precision", NARROW)
def test_autocast_and_loss_scaling(make_recipe, plain, mode, precision):
    settings = {"plugins": {"precision": NARROW[precision]}}
    wanted = plain(make_recipe, precision, **settings)
    assert_same(train(make_recipe, 1, MODES[mode], **settings), wanted)


def test_documents(make_recipe, plain):
    data = make_recipe({}).tree["data"] | {"pack": True, "document_mask": True}
    wanted = plain(make_recipe, "packed", data=data)
    for mode in ("full", "selective", "offload"):
        assert_same(train(make_recipe, 1, MODES[mode], data=data), wanted)


@pytest.mark.parametrize("mode", ["full", "offload"])
def test_frozen_layers(make_recipe, plain, mode):
    frozen = {"frozen": ("layers.0.", "layers.2.", "embed")}
    assert_same(train(make_recipe, 1, MODES[mode], **frozen), plain(make_recipe, "frozen", **frozen))


class Shared(Wet):
    """One layer that runs at the second and at the last place."""

    def __init__(self, config):
        super().__init__(config)
        self.model.layers[3] = self.model.layers[1]


@pytest.mark.parametrize("mode", ["full", "selective", "budget", "offload"])
def test_a_layer_that_runs_twice(make_recipe, plain, mode):
    assert_same(train(make_recipe, 1, MODES[mode], kind=Shared), plain(make_recipe, "shared", kind=Shared))


def zero(stage, **options):
    sizes = {} if stage == 3 else {"bucket_size_mb": 0.005}
    return {"plugins": {"ddp": None, "zero": {"stage": stage, **sizes, **options}}}


def tensor(**options):
    return {"plugins": {"ddp": None, "tensor_parallel": options}, "parallel": {"tensor_parallel": 2}}


def pipeline(schedule, batch=1):
    return {
        "plugins": {"ddp": None, "pipeline": {"schedule": schedule}},
        "parallel": {"pipeline_parallel": 2},
        "batch": {"micro_batch_size": batch, "global_batch_size": 6 * batch},
    }


HALVES = {"units": ["model.layers.*.mlp", "model.layers.*.self_attn"]}
PARALLEL = {
    "ddp": ({}, ["full"]),
    "zero 1": (zero(1), ["selective"]),
    "zero 2": (zero(2), ["full"]),
    "zero 3": (zero(3), ["full", "selective", "budget", "offload"]),
    "zero 3 of halves of layers": (zero(3, **HALVES), ["full", "selective"]),
    "fully_shard": (zero(3, provider="torch"), ["full", "offload"]),
    "tp": (tensor(), ["full", "selective", "budget"]),
    "sp": (tensor(sequence_parallel=True), ["full", "selective", "offload"]),
    "sp async": (tensor(**{"sequence_parallel": True, "async": True}), ["full", "selective"]),
    "1f1b": (pipeline("1f1b"), ["full", "selective", "offload"]),
    "zb_h1": (pipeline("zb_h1"), ["full", "selective", "offload"]),
    "zbv": (pipeline("zbv"), ["full", "selective", "budget", "mlp"]),
    "dualpipe_v": (pipeline("dualpipe_v"), ["selective"]),
}


@pytest.mark.parametrize(
    ("parallel", "mode"), [(parallel, mode) for parallel, (_, modes) in PARALLEL.items() for mode in modes]
)
def test_two_ranks(make_recipe, plain, parallel, mode):
    settings = PARALLEL[parallel][0]
    wanted = plain(make_recipe, parallel, 2, **settings)
    assert_same(train(make_recipe, 2, MODES[mode], **settings), wanted)


def test_all_at_once_against_one_plain_process(make_recipe):
    """Four ranks: stages in a V, tokens divided, no recomputation in the reference, which is a plain loop: fp64."""
    bounds = {"gradients": 1e-12, "norm": 1e-12, "weights": 1e-12, "optimizer": 1e-12, "loss": 1e-12, "lr": 1e-15}
    settings = {
        "compute": "fp64",
        "parallel": {"pipeline_parallel": 2, "tensor_parallel": 2},
        "batch": {"micro_batch_size": 2, "global_batch_size": 12},
    }
    plugins = {"ddp": None, "tensor_parallel": {"sequence_parallel": True}, "pipeline": {"schedule": "zbv"}}
    resolved = recipe(make_recipe, 1, None, compute="fp64", batch={"micro_batch_size": 12, "global_batch_size": 12})
    wanted = plain_run(resolved, prepare(resolved), adamw, compute="fp64", max_norm=0.1)
    for mode in (FULL, SELECTIVE):
        ranks = train(make_recipe, 4, mode, kind=Llama, plugins=plugins, **settings)
        assert_within(compare(ranks[0], wanted), bounds)


def adamw(model):
    settings = ADAMW["adamw"]
    several = [p for p in model.parameters() if p.ndim >= 2], [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": some, "weight_decay": decay} for some, decay in zip(several, (0.1, 0.0), strict=True)]
    return torch.optim.AdamW(groups, lr=settings["lr"], betas=tuple(settings["betas"]), eps=1e-8)


def test_the_comparison_sees_random_numbers_that_are_drawn_anew(make_recipe, plain, monkeypatch):
    monkeypatch.setattr(ambient, "_set", lambda states, device: None)
    wanted, found = plain(make_recipe, "one")[0], train(make_recipe, 1, FULL)[0]
    assert any(
        not torch.equal(each, found[0].gradients[name])
        for name, each in wanted[0].gradients.items()
        if each is not None
    )


class Evaluates(Plugin):
    """Counts how often layers run in training and in evaluation."""

    def __init__(self, path):
        super().__init__()
        self.path, self.runs = path, {"training": 0, "evaluation": 0}

    @hookimpl
    def recompute(self, model):
        for layer in model.model.layers:
            layer.input_layernorm.register_forward_pre_hook(self.count)

    def count(self, *_):
        self.runs["training" if torch.is_grad_enabled() else "evaluation"] += 1

    @hookimpl
    def close(self):
        self.path.write_text(json.dumps(self.runs))


def test_evaluation_costs_nothing_more(make_recipe, tmp_path):
    runs = {}
    for name, options in (("plain", None), ("full", FULL), ("selective", SELECTIVE)):
        resolved = recipe(
            make_recipe,
            1,
            options,
            training={"max_steps": 2, "log_every": 1, "eval_every": 1},
            data=make_recipe({}).tree["data"] | {"validation_fraction": 0.1},
        )
        record_ranks(resolved, 1, {"counts": Evaluates(tmp_path / name)})
        runs[name] = json.loads((tmp_path / name).read_text())
    assert runs["full"]["evaluation"] == runs["plain"]["evaluation"] > 0
    assert runs["full"]["training"] == runs["selective"]["training"] == 2 * runs["plain"]["training"] == 2 * 4 * 3 * 2


def test_collectives_that_run_again_are_counted(make_recipe, tmp_path):
    """Of the two sums of a region in a layer's forward the first runs again, and the second, behind the last tensor
    that is saved, does not: 4 sums become 5 in each layer and microbatch.
    """
    calls = {}
    for name, options in (("plain", None), ("full", FULL)):
        settings = tensor()
        settings["plugins"] = settings["plugins"] | {"ledger": {}}
        resolved = recipe(make_recipe, 2, options, run={"dir": str(tmp_path / name)}, **settings)
        ranks = record_ranks(resolved, 2)
        rows = json.loads((tmp_path / name / "ledger.json").read_text())["rows"]
        calls[name] = sum(row["calls"] for row in rows if row["plugin"] == "tensor_parallel") / len(ranks[0])
    ranks, layers, microbatches = 2, 4, 3
    assert calls["full"] - calls["plain"] == ranks * layers * microbatches
