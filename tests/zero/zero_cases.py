"""Recipes, models and references that the tests of `zero` share."""

import os

import torch
from torch import nn
from zero_models import ODD

from camshaft.data import prepare
from camshaft.distributed import Environment
from camshaft.loop import session
from camshaft.models.llama import Llama
from camshaft.plugin import Plugin, hookimpl
from camshaft.rundir import RunDirectory
from camshaft.testing.compare import assert_bit_equal, assert_within, compare
from camshaft.testing.ranks import run_ranks
from camshaft.testing.reference import plain_run
from camshaft.testing.run import Quiet, record_ranks

FULL = os.environ.get("CAMSHAFT_FULL_MATRIX") == "1"
"""Whether the complete product of all factors runs, not a sample of it."""

# As for ddp (tests/parity). The noise of sums in another order is 1e-15 in fp64.
BOUNDS = {
    "fp64": {"gradients": 1e-12, "norm": 1e-12, "weights": 1e-12, "optimizer": 1e-12, "loss": 1e-12, "lr": 1e-15},
    "fp32": {"gradients": 1e-4, "norm": 2e-6, "weights": 1e-5, "optimizer": 1e-5, "loss": 2e-6, "lr": 1e-15},
    "bf16": {"loss": 1e-3, "norm": 5e-3, "weights": 1e-2},
}
ADAMW = {"adamw": {"lr": 3e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}}
SGD = {"sgd": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}}
MAX_NORM = 0.1
BUCKET = 0.01
"""MiB: several buckets even for this small model, and parameters larger than one."""

STAGES = {
    "1": {"stage": 1, "bucket_size_mb": BUCKET},
    "2": {"stage": 2, "bucket_size_mb": BUCKET},
    "2 last": {"stage": 2, "bucket_size_mb": BUCKET, "reduce": "last"},
    "3": {"stage": 3},
    "3 last": {"stage": 3, "reduce": "last"},
    "3 kept": {"stage": 3, "reshard_after_forward": False},
}
BOTH = {"dp_shard": "shard", "dp_replicate": "shard"}
HYBRID = {
    "hybrid 1": STAGES["1"],
    "hybrid 2": STAGES["2"],
    "hybrid 3": STAGES["3"],
    "hybrid 1, optimizer along both": {"optimizer": BOTH, "bucket_size_mb": BUCKET},
    "hybrid 3, optimizer along both": {"parameters": "shard", "gradients": "shard", "optimizer": BOTH},
}
ROWS = {
    "ddp": None,
    "replicate": {"parameters": "replicate", "bucket_size_mb": BUCKET},
    **STAGES,
    **HYBRID,
}
"""Name of a row of the family to the options of `zero`; None is the plugin `ddp`."""


class WithGain(nn.Module):
    """A module that adds a gain to the samples whose length is in a range, and to no others.

    Whether its parameter is used depends on the samples, so on window, microbatch and rank.
    """

    def __init__(self, inner, width, lengths):
        super().__init__()
        self.inner, self.range = inner, lengths
        self.gain = nn.Parameter(torch.empty(width, device="meta"))
        self.lengths = None

    def forward(self, *inputs):
        hidden = self.inner(*inputs)
        chosen = (self.lengths >= self.range.start) & (self.lengths < self.range.stop)
        if not bool(chosen.any()):
            return hidden
        return hidden + 0.02 * chosen[:, None, None].to(hidden.dtype) * self.gain


class Picky(Llama):
    """Has parameters that are used by some windows, microbatches and ranks only, in a block and beside the blocks."""

    def forward(self, batch):
        for module in self.modules():
            if isinstance(module, WithGain):
                module.lengths = (batch.labels >= 0).sum(1)
        return super().forward(batch)


VARIANTS = {
    "plain": {},
    "frozen": {"frozen": ("layers.1.", "norm")},
    "tied frozen, unused": {"frozen": ("embed_tokens",), "unused": True},
    "picky": {"picky": True},
}


def change(model, frozen=(), unused=False, picky=False, odd=None):
    """Freeze parameters, add ones that nothing uses, or that some samples use, or change how modules run."""
    if odd is not None:
        ODD[odd](model)
    for name, parameter in model.named_parameters():
        if any(part in name for part in frozen):
            parameter.requires_grad_(False)
    if unused:
        model.unused = nn.Parameter(torch.empty(7, 3, device="meta"))
        model.model.layers[0].unused = nn.Parameter(torch.empty(5, device="meta"))
    if picky:
        width, layers = model.config.hidden_size, model.model.layers
        model.__class__ = Picky
        model.model.norm = WithGain(model.model.norm, width, range(8))
        for lengths, layer in zip((range(10), range(20, 99), range(25, 99)), layers, strict=False):
            layer.mlp = WithGain(layer.mlp, width, lengths)


class Variant(Plugin):
    """Owns ``build_model``."""

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


def torch_adamw(model, lr=3e-3):
    return torch.optim.AdamW(groups(model, 0.1), lr=lr, betas=(0.9, 0.95), eps=1e-8)


def torch_sgd(model):
    return torch.optim.SGD(groups(model, 0.01), lr=0.05, momentum=0.9)


SLOW = {"adamw": {**ADAMW["adamw"], "lr": 1e-3}}
OPTIMIZERS = {
    "adamw": (ADAMW, torch_adamw),
    "sgd": (SGD, torch_sgd),
    # With bf16 parameters: at 3e-3 the training of this small model amplifies noise, on one process as well.
    "slow adamw": (SLOW, lambda model: torch_adamw(model, 1e-3)),
}


def linear(step, total):
    """What ``lr_schedule`` below must give."""
    return (step + 1) / 4 if step < 4 else 1.0 - 0.9 * (step - 4) / (total - 5)


def plugins(row, optimizer="adamw", compute="fp64", max_norm=MAX_NORM, **zero):
    """The plugins of a recipe; keywords change options of the row."""
    chosen = ROWS[row] if isinstance(row, str) else row
    return {
        "ddp": {"bucket_size_mb": 0.005} if chosen is None else None,
        "zero": None if chosen is None else {**chosen, **zero},
        **OPTIMIZERS[optimizer][0],
        "lr_schedule": {"type": "linear", "warmup_steps": 4, "min_lr_ratio": 0.1},
        "clip": {"max_norm": max_norm},
        "precision": compute if isinstance(compute, dict) else {"compute": compute},
    }


def global_batch(world_size, accumulation):
    """12 samples, or 16 where 12 cannot be divided so."""
    return 12 if 12 % (world_size * accumulation) == 0 else 16


def sections(row, world_size, accumulation, steps=20):
    """Sections that differ from ``make_recipe``'s: 20 windows, the last one of 7 samples."""
    total = global_batch(world_size, accumulation)
    samples = (steps - 1) * total + 7
    found = {
        "batch": {"micro_batch_size": total // (accumulation * world_size), "global_batch_size": total},
        "training": {"max_tokens": 32 * samples, "log_every": 1},
    }
    if isinstance(row, str) and row.startswith("hybrid"):
        found["parallel"] = {"data_parallel_shard": world_size // 2}
    return found


_references = {}


def reference(make_recipe, total=12, optimizer="adamw", compute="fp64", variant="plain", steps=20, parameters=None):
    """Records of the plain loop; made once for each case."""
    key = (total, optimizer, compute, variant, steps, parameters)
    if key not in _references:
        chosen = {**plugins("replicate", optimizer, "fp32"), "zero": None}
        batch = {"micro_batch_size": total, "global_batch_size": total}
        training = {"max_tokens": 32 * ((steps - 1) * total + 7), "log_every": 1}
        resolved = make_recipe(chosen, batch=batch, training=training)
        _references[key] = records = plain_run(
            resolved,
            prepare(resolved),
            OPTIMIZERS[optimizer][1],
            compute=compute,
            max_norm=MAX_NORM,
            factor=linear,
            prepare=lambda model: change(model, **changes(variant)),
            parameters=parameters,
        )
        always = variant == "only a scalar" or all(record.norm > MAX_NORM for record in records)
        assert len(records) == steps and always, "clipping is active in every step"
    return _references[key]


def changes(variant):
    return {"odd": variant} if variant in ODD else VARIANTS[variant]


def observers(variant):
    return {"variant": Variant(**changes(variant))} if changes(variant) else {}


def train(make_recipe, row, world_size, accumulation=3, variant="plain", extra=None, steps=20, **settings):
    """Records of every rank of a row of the family, bit-equal to each other."""
    changed = sections(row, world_size, accumulation, steps) | settings.pop("sections", {})
    resolved = make_recipe(plugins(row, **settings), world_size, **changed)
    ranks = record_ranks(resolved, world_size, {**observers(variant), **(extra or {})})
    for other in ranks[1:]:
        assert_bit_equal(ranks[0], other)
    return ranks


def ending(rank, world_size, resolved, extra):
    """What a run leaves: this rank's parts with what the optimizer keeps of them, and the whole model.

    Nothing is recorded in between, which would make ranks wait for each other.
    """
    environment = Environment(rank, rank, world_size, world_size, "torchrun" if world_size > 1 else "none")
    with session(resolved, environment, RunDirectory(resolved.recipe.run.dir), extra) as trainer:
        trainer.train(Quiet(), Quiet())
        state = trainer.state
        parts = {
            f"{piece.name} from {piece.start} {key}": flat.detach().clone()
            for part in state.world.parts
            for key, values in {"weights": part.tensor, **state.optimizer.state[part.tensor]}.items()
            if values.shape == part.tensor.shape
            for piece, flat in part.slices(values)
        }
    return parts, {name: parameter.detach().clone() for name, parameter in state.model.named_parameters()}


def train_unseen(make_recipe, row, world_size, accumulation=2, variant="picky", extra=None, steps=5, **settings):
    """What ``ending`` returns, of every rank; the model is the same on all of them."""
    changed = sections(row, world_size, accumulation, steps) | settings.pop("sections", {})
    changed["training"] = {**changed["training"], "log_every": 1000}
    resolved = make_recipe(plugins(row, compute="fp32", **settings), world_size, **changed)
    endings = run_ranks(world_size, ending, resolved, {**observers(variant), **(extra or {})})
    for _, model in endings:
        assert_same(model, endings[0][1])
    return endings


def assert_same(one, other):
    """Two dicts of tensors equal in every bit."""
    assert one.keys() == other.keys()
    unequal = [name for name in one if not torch.equal(one[name], other[name])]
    assert not unequal, f"unequal: {unequal}"


def assert_parity(records, wanted, compute):
    """Within the bounds of ``compute``; returns the worst deviations."""
    worst = compare(records, wanted)
    assert_within(worst, BOUNDS[compute])
    return {quantity: value for quantity, (value, _) in worst.items()}
