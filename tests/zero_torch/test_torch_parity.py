"""``fully_shard`` behind our slots against a plain loop: gradients, norm, weights, state and loss of 20 steps."""

import pytest
import torch

from camshaft.data import prepare
from camshaft.models.llama import Llama
from camshaft.plugin import Plugin, hookimpl
from camshaft.testing.compare import assert_bit_equal, assert_within, compare
from camshaft.testing.reference import plain_run
from camshaft.testing.run import record_ranks as train

# As for ddp: 1e-12 in fp64; in fp32 sums in another order.
BOUNDS = {
    "fp64": {"gradients": 1e-12, "norm": 1e-12, "weights": 1e-12, "optimizer": 1e-12, "loss": 1e-12, "lr": 1e-15},
    "fp32": {"gradients": 1e-4, "norm": 2e-6, "weights": 1e-5, "optimizer": 1e-5, "loss": 2e-6, "lr": 1e-15},
}
ADAMW = {"adamw": {"lr": 3e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}}
SGD = {"sgd": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}}
MODES = [{"keep": keep, "reduce": reduce} for keep in (True, False) for reduce in ("each", "last")]
NAMES = [f"stage {2 if mode['keep'] else 3}, {mode['reduce']}" for mode in MODES]


def change(model, frozen=(), unused=False):
    for name, parameter in model.named_parameters():
        if any(part in name for part in frozen):
            parameter.requires_grad_(False)
    if unused:
        model.unused = torch.nn.Parameter(torch.empty(7, 3, device="meta"))
        model.model.layers[0].unused = torch.nn.Parameter(torch.empty(1, 3, device="meta"))


class Variant(Plugin):
    """Owns ``build_model``: freezes, and adds parameters that nothing uses."""

    def __init__(self, **changes):
        super().__init__()
        self.changes = changes

    @hookimpl
    def build_model(self, config):
        model = Llama(config)
        change(model, **self.changes)
        return model


def groups(model, decay):
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    return [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]


def torch_adamw(model):
    return torch.optim.AdamW(groups(model, 0.1), lr=3e-3, betas=(0.9, 0.95), eps=1e-8)


def torch_sgd(model):
    return torch.optim.SGD(groups(model, 0.01), lr=0.05, momentum=0.9)


OPTIMIZERS = {"adamw": (ADAMW, torch_adamw), "sgd": (SGD, torch_sgd)}


def plugins(optimizer, compute, mode):
    return {
        "ddp": None,
        "torch_zero": mode,
        **optimizer,
        "lr_schedule": {"type": "linear", "warmup_steps": 4, "min_lr_ratio": 0.1},
        "clip": {"max_norm": 0.1},
        "precision": {"compute": compute},
    }


def linear(step, total):
    return (step + 1) / 4 if step < 4 else 1.0 - 0.9 * (step - 4) / (total - 5)


def reference(make_recipe, optimizer, compute, **changes):
    settings, build = OPTIMIZERS[optimizer]
    resolved = make_recipe({**plugins(settings, compute, {}), "torch_zero": None})
    records = plain_run(
        resolved,
        prepare(resolved),
        build,
        compute=compute,
        max_norm=0.1,
        factor=linear,
        prepare=lambda model: change(model, **changes),
    )
    assert len(records) == 20 and all(record.norm > 0.1 for record in records), "clipping must be active in every step"
    return records


def assert_parity(ranks, wanted, bounds):
    assert_within(compare(ranks[0], wanted), bounds)
    for other in ranks[1:]:
        assert_bit_equal(ranks[0], other)


@pytest.mark.parametrize("compute", ["fp64", "fp32"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_two_ranks_equal_one_process(make_recipe, optimizer, compute):
    """Uneven tokens, tied embeddings, sizes that no number of ranks divides, accumulation 3, a short last window."""
    wanted = reference(make_recipe, optimizer, compute)
    settings = OPTIMIZERS[optimizer][0]
    for mode in MODES:
        assert_parity(train(make_recipe(plugins(settings, compute, mode), 2), 2), wanted, BOUNDS[compute])


@pytest.mark.parametrize("mode", MODES, ids=NAMES)
def test_hybrid_sharding_equals_one_process(make_recipe, mode):
    wanted = reference(make_recipe, "adamw", "fp64")
    resolved = make_recipe(plugins(ADAMW, "fp64", mode), 4, parallel={"data_parallel_shard": 2})
    assert_parity(train(resolved, 4), wanted, BOUNDS["fp64"])


def test_four_ranks_hold_fewer_rows_than_there_are_ranks(make_recipe):
    """The head dimension of 6 leaves key and value projections of 6 rows: uneven shards, and an unused one of 1 row."""
    wanted = reference(make_recipe, "adamw", "fp64", unused=True)
    resolved = make_recipe(plugins(ADAMW, "fp64", MODES[-1]), 4)
    assert_parity(train(resolved, 4, {"variant": Variant(unused=True)}), wanted, BOUNDS["fp64"])


@pytest.mark.parametrize(
    "changes",
    [
        {"frozen": ("layers.1.", "norm"), "unused": False},
        {"frozen": ("embed_tokens",), "unused": True},
        {"frozen": ("embed_tokens", "layers.0.", "layers.1."), "unused": False},
    ],
    ids=["frozen-layer-and-norms", "frozen-tied-and-unused", "frozen-bottom"],
)
def test_frozen_tied_and_unused_parameters(make_recipe, changes):
    wanted = reference(make_recipe, "adamw", "fp64", **changes)
    for mode in MODES:
        ranks = train(make_recipe(plugins(ADAMW, "fp64", mode), 2), 2, {"variant": Variant(**changes)})
        assert_parity(ranks, wanted, BOUNDS["fp64"])
    for name, value in wanted[0].weights.items():
        if any(part in name for part in changes["frozen"]) or name.endswith("unused"):
            assert torch.equal(value, ranks[0][-1].weights[name]), f"{name} moved"


@pytest.mark.parametrize("mode", MODES, ids=NAMES)
def test_bf16_stays_within_its_stated_bound(make_recipe, mode):
    wanted = reference(make_recipe, "adamw", "bf16")
    ranks = train(make_recipe(plugins(ADAMW, "bf16", mode), 2), 2)
    # The bounds for bf16 autocast of the other rows of the family.
    assert_parity(ranks, wanted, {"loss": 1e-3, "norm": 5e-3, "weights": 1e-2})
    assert all(tensor.dtype == torch.float32 for tensor in ranks[0][-1].weights.values()), "masters are fp32"
