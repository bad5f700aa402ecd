"""Optimizers whose update needs sums over whole parameters, where axes divide these, and momentum of SGD."""

import pytest
import textbook
import torch
from parallel_cases import EXACT, MAX_NORM, MODEL, STEPS, plugins, run, training

from camshaft.data import prepare
from camshaft.testing.compare import assert_within, compare
from camshaft.testing.reference import plain_run

pytestmark = pytest.mark.broad


def lamb(model):
    decaying, plain = textbook.split(
        model, textbook.lamb, lr=0.02, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, adapt=True, limit=10.0
    )
    return textbook.Textbook([decaying, {**plain, "adapt": False}])


def adafactor(model):
    return textbook.Textbook(
        textbook.split(model, textbook.adafactor, lr=0.02, weight_decay=0.1, limit=1.0, scaled=True)
    )


def lion(model):
    return textbook.Textbook(textbook.split(model, textbook.lion, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.3))


def muon(model):
    names = {parameter: name for name, parameter in model.named_parameters()}
    decaying, plain = textbook.split(model, textbook.adamw, lr=2e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    hidden = [p for p in decaying["params"] if "embed" not in names[p]]
    first = {"params": hidden, "rule": textbook.muon, "lr": 0.01, "momentum": 0.9, "weight_decay": 0.05}
    first |= {"nesterov": True, "scaling": "original", "iterations": 5}
    rest = [p for p in decaying["params"] if "embed" in names[p]]
    return textbook.Textbook([first, decaying | {"params": rest}, plain])


def sgd(model):
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.01},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=0.05, momentum=0.9)


MUON = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.05, "scaling": "original", "round_mb": 0.005}
MUON["exclude"] = ["*embed*"]  # under a pipeline only one rank has it
MUON["adamw"] = {"lr": 2e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
OPTIMIZERS = {
    "lamb": ({"lamb": {"lr": 0.02}}, lamb),
    "adafactor": ({"adafactor": {"lr": 0.02, "weight_decay": 0.1, "scale_by_weights": True}}, adafactor),
    "lion": ({"lion": {"lr": 1e-3}}, lion),
    "muon": ({"muon": MUON}, muon),
    "sgd": ({"sgd": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}}, sgd),
}
CASES = [
    ("lamb", "none", "tp", 1),
    ("lamb", "zero 2", "tp + sp", 2),
    ("lamb", "zero 3", "zb_h1", 2),
    ("adafactor", "zero 1", "tp", 2),
    ("adafactor", "none", "tp + sp", 1),
    ("adafactor", "ddp", "1f1b", 2),
    ("lion", "zero 2", "tp + sp", 2),
    ("muon", "none", "tp", 1),
    ("muon", "zero 2", "tp + sp", 2),
    ("muon", "zero 3", "tp", 2),
    ("muon", "ddp", "tp + sp", 2),
    ("muon", "zero 1", "zbv", 2),
    ("sgd", "zero 2", "interleaved_1f1b", 2),
    ("sgd", "ddp", "tp + sp", 2),
]


@pytest.fixture(scope="module")
def known():
    """References that were computed already."""
    return {}


@pytest.mark.parametrize(("optimizer", "row", "axis", "data"), CASES)
def test_sums_over_boxes_copies_and_shards_are_those_of_one_process(make_recipe, known, optimizer, row, axis, data):
    """One key head on two ranks, replicated norms: copies beside boxes in one part."""
    settings, build = OPTIMIZERS[optimizer]
    if optimizer not in known:
        whole = {"micro_batch_size": 12, "global_batch_size": 12}
        plain = make_recipe({**plugins("none", settings)}, model=MODEL, batch=whole, training=training(STEPS))
        known[optimizer] = plain_run(plain, prepare(plain), build, compute="fp64", max_norm=MAX_NORM)
        assert all(record.norm > MAX_NORM for record in known[optimizer])
    records = run(make_recipe, row, axis, data, accumulation=6 if axis == "zbv" else 3, optimizer=settings)
    assert_within(compare(records, known[optimizer]), EXACT)
