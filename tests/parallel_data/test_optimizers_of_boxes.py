"""Optimizers whose update needs sums over whole parameters, where axes divide these, and momentum of SGD."""

import pytest
import textbook
from parallel_cases import EXACT, MAX_NORM, MODEL, STEPS, plugins, run, training

from camshaft.data import prepare
from camshaft.testing.compare import assert_within, compare
from camshaft.testing.reference import plain_run


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


def sgd(model):
    import torch

    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.01},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=0.05, momentum=0.9)


OPTIMIZERS = {
    "lamb": ({"lamb": {"lr": 0.02}}, lamb),
    "adafactor": ({"adafactor": {"lr": 0.02, "weight_decay": 0.1, "scale_by_weights": True}}, adafactor),
    "lion": ({"lion": {"lr": 1e-3}}, lion),
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
    records = run(make_recipe, row, axis, data, optimizer=settings)
    assert_within(compare(records, known[optimizer]), EXACT)
