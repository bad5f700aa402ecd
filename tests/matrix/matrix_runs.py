"""Training a combination, and the one plain process that it must equal."""

from __future__ import annotations

import torch
from matrix_cases import NUMBERS, STEPS, Combination, plugins, sections

from camshaft.data import prepare
from camshaft.recipe import check
from camshaft.testing.compare import assert_bit_equal, assert_within, compare
from camshaft.testing.reference import plain_run
from camshaft.testing.run import record_ranks

# As for ddp and zero (tests/parity, tests/zero): the noise of sums in another order is 1e-15 in fp64.
BOUNDS = {
    "fp64": {"gradients": 1e-12, "norm": 1e-12, "weights": 1e-12, "optimizer": 1e-12, "loss": 1e-12, "lr": 1e-15},
    "bf16": {"loss": 1e-3, "norm": 5e-3, "weights": 1e-2},
}


def groups(model, decay):
    """Vectors do not decay."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]


TORCH = {
    "adamw": lambda model: torch.optim.AdamW(groups(model, 0.1), lr=3e-3, betas=(0.9, 0.95), eps=1e-8),
    "sgd": lambda model: torch.optim.SGD(groups(model, 0.01), lr=0.05, momentum=0.9),
}


def linear(step, total):
    """What ``lr_schedule`` must give."""
    return (step + 1) / 4 if step < 4 else 1.0 - 0.9 * (step - 4) / (total - 5)


def recipe_of(make_recipe, combination, steps=STEPS):
    """The combination's recipe, loaded for its number of ranks."""
    return make_recipe(plugins(combination), combination.ranks, **sections(combination, steps))


def refusal(make_recipe, combination):
    """Problems for which ``validate`` refuses it; none if it is legal."""
    return check(recipe_of(make_recipe, combination), combination.ranks).problems


_references = {}


def reference(make_recipe, numbers):
    """Records of the plain loop over the same global batches; made once for each precision, optimizer and model."""
    if numbers not in _references:
        optimizer, compute, _ = NUMBERS[numbers]
        alone = Combination("none", "-", "-", numbers)
        resolved = recipe_of(make_recipe, alone)
        (name,) = optimizer
        records = plain_run(resolved, prepare(resolved), TORCH[name], compute=compute, max_norm=0.1, factor=linear)
        assert len(records) == STEPS and all(record.norm > 0.1 for record in records), "clipping is active in each step"
        _references[numbers] = records
    return _references[numbers]


def train(make_recipe, combination):
    """Train it on forked ranks; returns its worst relative error within the bounds of its precision.

    Every rank's records are the same in every bit: ``Probe`` puts whole tensors together and refuses unequal copies.
    """
    resolved = recipe_of(make_recipe, combination)
    ranks = record_ranks(resolved, combination.ranks, timeout_s=60 + 5 * combination.ranks)
    for other in ranks[1:]:
        assert_bit_equal(ranks[0], other)
    worst = compare(ranks[0], reference(make_recipe, combination.numbers))
    bounds = BOUNDS[combination.compute]
    assert_within(worst, bounds)
    return {quantity: worst[quantity][0] for quantity in bounds if quantity != "lr"}
