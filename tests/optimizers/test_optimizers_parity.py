"""Adafactor, Lion, LAMB and Muon against their papers' formulas in fp64: one process, and divided over several."""

import flat_shards
import pytest
import textbook
import torch

from camshaft.data import prepare
from camshaft.models.llama import Llama
from camshaft.plugin import Plugin, hookimpl
from camshaft.testing.compare import assert_bit_equal, assert_within, compare
from camshaft.testing.reference import plain_run
from camshaft.testing.run import record_ranks

pytestmark = pytest.mark.broad

BOUNDS = dict.fromkeys(("gradients", "norm", "weights", "optimizer", "loss"), 1e-12) | {"lr": 1e-15}
ADAM = {"lr": 2e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}


class Variant(Plugin):
    """Owns ``build_model``: freezes a layer, and adds parameters that nothing uses, one of them a matrix."""

    @hookimpl
    def build_model(self, config):
        model = Llama(config)
        change(model)
        return model


def change(model):
    for name, parameter in model.named_parameters():
        if "layers.1." in name or name == "model.norm.weight":
            parameter.requires_grad_(False)
    model.unused = torch.nn.Linear(7, 3)


def lion(model):
    return textbook.Textbook(textbook.split(model, textbook.lion, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.3))


def lamb(model):
    decaying, plain = textbook.split(
        model, textbook.lamb, lr=0.02, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, adapt=True, limit=10.0
    )
    return textbook.Textbook([decaying, {**plain, "adapt": False}])


def adafactor(limit, scaled, lr):
    return lambda model: textbook.Textbook(
        textbook.split(model, textbook.adafactor, lr=lr, weight_decay=0.1, limit=limit, scaled=scaled)
    )


def muon(model):
    names = {parameter: name for name, parameter in model.named_parameters()}
    decaying, plain = textbook.split(model, textbook.adamw, **ADAM)
    hidden = [p for p in decaying["params"] if not any(key in names[p] for key in ("embed", "lm_head"))]
    others = [p for p in decaying["params"] if not any(p is each for each in hidden)]
    first = {"params": hidden, "rule": textbook.muon, "lr": 0.01, "momentum": 0.9, "weight_decay": 0.05}
    first |= {"nesterov": True, "scaling": "original", "iterations": 5}
    return textbook.Textbook([first, decaying | {"params": others}, plain])


def muon_options(**options):
    chosen = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.05, "scaling": "original", "round_mb": 0.01}
    return {"muon": chosen | {"adamw": ADAM} | options}


CASES = {
    "adafactor": ({"adafactor": {"lr": 2e-3, "weight_decay": 0.1, "clip_threshold": 0.5}}, adafactor(0.5, False, 2e-3)),
    "adafactor-scaled": (
        {"adafactor": {"lr": 0.02, "weight_decay": 0.1, "scale_by_weights": True}},
        adafactor(1.0, True, 0.02),
    ),
    "lion": ({"lion": {"lr": 1e-3}}, lion),
    "lamb": ({"lamb": {"lr": 0.02}}, lamb),
    "muon": (muon_options(), muon),
}


def plugins(optimizer, storage=None):
    return {
        **(storage or {}),
        **optimizer,
        "lr_schedule": {"type": "linear", "warmup_steps": 4, "min_lr_ratio": 0.1},
        "clip": {"max_norm": 0.1},
        "precision": {"compute": "fp64"},
    }


def linear(step, total):
    return (step + 1) / 4 if step < 4 else 1.0 - 0.9 * (step - 4) / (total - 5)


UNTIED = {"tie_word_embeddings": False, "attention_bias": True}
ACCUMULATION = {1: 6, 2: 3, 3: 2, 4: 3}


@pytest.fixture(scope="module")
def known():
    """References that were computed already."""
    return {}


@pytest.fixture
def run(make_recipe, monkeypatch, known):
    """(recorded ranks, the textbook's records) of an optimizer under a storage."""
    flat_shards.install(monkeypatch)

    def go(optimizer, world_size, *, tied, storage=None, **parallel):
        settings, build = CASES[optimizer]
        sections = {} if tied else {"model": make_recipe(plugins(settings)).tree["model"] | UNTIED}
        plain = make_recipe(plugins(settings), 1, **sections)
        if (optimizer, tied) not in known:
            data = prepare(plain)
            known[optimizer, tied] = plain_run(
                plain, data, build, compute="fp64", max_norm=0.1, factor=linear, prepare=change
            )
        chosen = plugins(settings, storage)
        resolved = make_recipe(chosen, world_size, accumulation=ACCUMULATION[world_size], **sections, **parallel)
        return record_ranks(resolved, world_size, {"variant": Variant()}), known[optimizer, tied]

    return go


def check(ranks, reference):
    assert len(reference) == 20 and all(record.norm > 0.1 for record in reference), "clipped in every step"
    assert_within(compare(ranks[0], reference), BOUNDS)
    for other in ranks[1:]:
        assert_bit_equal(ranks[0], other)


@pytest.mark.parametrize("optimizer", CASES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_one_process_follows_the_textbook(run, optimizer, tied):
    ranks, reference = run(optimizer, 1, tied=tied)
    check(ranks, reference)


@pytest.mark.parametrize(
    ("optimizer", "world_size"),
    [(name, size) for name in CASES for size in (2, 3) if (name, size) not in {("lion", 2), ("adafactor-scaled", 3)}],
)
def test_divided_parts_change_nothing(run, optimizer, world_size):
    """Frozen, tied and unused parameters, accumulation, clipping; parts that are empty on some rank."""
    storage = {"flat_shards": {"empty_gradients": world_size == 2}}
    ranks, reference = run(optimizer, world_size, tied=world_size == 2, storage=storage)
    check(ranks, reference)
    last = reference[-1]
    assert "unused.weight" in last.weights and not any(key.startswith("unused") for key in last.optimizer)


@pytest.mark.parametrize("optimizer", ["lamb", "muon"])
def test_replicas_change_nothing(run, optimizer):
    ranks, reference = run(optimizer, 2, tied=False)
    check(ranks, reference)


@pytest.mark.parametrize("optimizer", ["adafactor", "lion", "lamb", "muon"])
@pytest.mark.parametrize("zero", [{"stage": 1}, {"stage": 2}, {"stage": 3}], ids=["zero1", "zero2", "zero3"])
def test_zero_changes_nothing(run, optimizer, zero):
    world_size = 3 if zero["stage"] == 2 else 2
    storage = {"ddp": None, "zero": zero | ({} if zero["stage"] == 3 else {"bucket_size_mb": 0.01})}
    ranks, reference = run(optimizer, world_size, tied=zero["stage"] != 3, storage=storage)
    check(ranks, reference)


@pytest.mark.parametrize("optimizer", ["lamb", "muon"])
@pytest.mark.parametrize("kind", ["hybrid", "torch"])
def test_two_by_two_ranks_and_torchs_storage_change_nothing(run, optimizer, kind):
    """Hybrid: two replicas of two shards each, so the sums and the exchange run twice. torch: shards by rows."""
    sections = {"parallel": {"data_parallel_shard": 2}} if kind == "hybrid" else {}
    zero = {"stage": 2} if kind == "hybrid" else {"stage": 3, "provider": "torch"}
    storage = {"ddp": None, "zero": zero}
    world_size = 4 if kind == "hybrid" else 2
    ranks, reference = run(optimizer, world_size, tied=False, storage=storage, **sections)
    check(ranks, reference)
