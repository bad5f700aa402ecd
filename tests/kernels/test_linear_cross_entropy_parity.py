"""Runs with the loss made in chunks against plain runs, in fp64: raw gradients, norm, weights, state, loss at 1e-12."""

import pytest

from camshaft.data import prepare
from camshaft.plugin import Plugin, hookimpl
from camshaft.testing.compare import assert_bit_equal, assert_within, compare
from camshaft.testing.run import record_ranks

pytestmark = pytest.mark.broad

EXACT = {"gradients": 1e-12, "norm": 1e-12, "weights": 1e-12, "optimizer": 1e-12, "loss": 1e-12, "lr": 1e-15}
FUSED = {"kernels": {"linear_cross_entropy": "torch"}}


class SmallChunks(Plugin):
    """Chunks far smaller than a microbatch: a run this small would be one chunk."""

    @hookimpl
    def rewrite(self, world, config):
        fused = world.ops.linear_cross_entropy
        if fused is not None:
            world.ops.linear_cross_entropy = lambda *arguments: fused(*arguments, chunk=5)


def recipe(make_recipe, extra, world_size=1, layout=None, tied=True, **sections):
    plugins = {
        **(layout or {}),
        "adamw": {"lr": 3e-3, "weight_decay": 0.1},
        "clip": {"max_norm": 0.1},
        "precision": {"compute": "fp64"},
        **extra,
    }
    if world_size == 1 or layout:
        plugins["ddp"] = None
    model = {
        "vocab_size": 259, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
        "tie_word_embeddings": tied, "initializer_range": 0.05,
    }  # fmt: skip
    evaluation = {"eval_every": 2, "eval_samples": 3} if "data" in sections else {}
    chosen = {
        "model": model,
        "training": {"max_steps": 3, "log_every": 1, **evaluation},
        "batch": {"micro_batch_size": 2, "global_batch_size": 8},
    }
    return make_recipe(plugins, world_size, **(chosen | sections))


def validation(resolved):
    return resolved.tree["data"] | {"validation_fraction": 0.05}


def both(make_recipe, world_size, layout, tied=True, **sections):
    """(records of one plain process, of each rank with chunks)."""
    plain = recipe(make_recipe, {}, tied=tied)
    sections["data"] = validation(plain)
    plain = recipe(make_recipe, {}, tied=tied, data=sections["data"])
    prepare(plain)
    (wanted,) = record_ranks(plain, 1)
    assert len(wanted) == 3 and all(record.norm > 0.1 for record in wanted), "clipping must be active"
    fused = recipe(make_recipe, FUSED, world_size, layout, tied, **sections)
    return wanted, record_ranks(fused, world_size, {"small": SmallChunks()}, timeout_s=90)


PIPELINE = {"parallel": {"pipeline_parallel": 2}}
LAYOUTS = {
    "one-process": (1, {}, {}),
    "ddp": (2, {}, {}),
    "zero3": (2, {"zero": {"stage": 3}}, {}),
    "1f1b": (2, {"pipeline": {"schedule": "1f1b"}}, PIPELINE),
    "zb_h1": (2, {"pipeline": {"schedule": "zb_h1"}}, PIPELINE),
    "zbv": (2, {"pipeline": {"schedule": "zbv"}}, PIPELINE),
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_a_plain_run(make_recipe, layout, tied):
    """Accumulation of two to four microbatches; documents shorter than a sample mask labels of every row."""
    world_size, plugins, sections = LAYOUTS[layout]
    wanted, ranks = both(make_recipe, world_size, plugins, tied, **sections)
    for records in ranks:
        assert_within(compare(records, wanted), EXACT)
        assert_bit_equal(records, ranks[0])
    head = [name for name in ranks[0][0].gradients if name == "lm_head.weight"]
    assert bool(head) is not tied


# fp32: what rounding in another order makes, as between ranks (tests/parity).
NEAR = {"gradients": 1e-4, "norm": 2e-6, "weights": 1e-5, "optimizer": 1e-5, "loss": 2e-6, "lr": 1e-15}


def fp32(make_recipe, extra, world_size=1, layout=None, **sections):
    chosen = {"precision": {"compute": "fp32"}, **extra}
    return recipe(make_recipe, chosen, world_size, layout, **sections)


def test_a_weight_that_a_library_stores(make_recipe):
    """DeepSpeed's stage 3 has the head's weight inside of the head's forward alone."""
    plain = fp32(make_recipe, {})
    prepare(plain)
    (wanted,) = record_ranks(plain, 1)
    layout = {"deepspeed": {"stage": 3}}
    for records in record_ranks(fp32(make_recipe, FUSED, 2, layout), 2, {"small": SmallChunks()}, timeout_s=90):
        assert_within(compare(records, wanted), NEAR)


def test_tensor_parallel_keeps_its_own_loss(make_recipe):
    """``auto`` leaves the loss to who divides the vocabulary, and says so."""
    plain = recipe(make_recipe, {})
    prepare(plain)
    (wanted,) = record_ranks(plain, 1)
    sections = {"parallel": {"tensor_parallel": 2}}
    resolved = recipe(make_recipe, {"kernels": {"all": "auto"}}, 2, {"tensor_parallel": {}}, **sections)
    for records in record_ranks(resolved, 2, timeout_s=90):
        assert_within(compare(records, wanted), EXACT)
    told = (resolved.path.parent / "run2" / "kernels.txt").read_text()
    assert "linear_cross_entropy  unfused   auto   tensor parallel divides the vocabulary" in told


@pytest.mark.parametrize("frozen", [("lm_head",), ("model.",)], ids=["head", "all-but-the-head"])
def test_what_is_frozen_gets_no_gradient(make_recipe, frozen):
    plain, fused = (recipe(make_recipe, extra, tied=False) for extra in ({}, FUSED))
    prepare(plain)
    (wanted,) = record_ranks(plain, 1, {"freezes": Freezes(frozen)})
    (records,) = record_ranks(fused, 1, {"freezes": Freezes(frozen), "small": SmallChunks()})
    assert_within(compare(records, wanted), EXACT)
    for name, gradient in records[0].gradients.items():
        assert (gradient is None) == name.startswith(frozen)


class Freezes(Plugin):
    """Freezes what begins so, before anything is built over it."""

    def __init__(self, heads):
        super().__init__()
        self.heads = heads

    @hookimpl
    def split(self, model):
        for name, parameter in model.named_parameters():
            if name.startswith(self.heads):
                parameter.requires_grad_(False)
        return model


def test_bf16_is_no_further_from_fp64_than_both_apart(make_recipe):
    """Under autocast, over a whole run: the loss and the gradients of the first step."""
    results = {}
    for name, extra in (("exact", {}), ("apart", BF16), ("fused", {**BF16, **FUSED})):
        resolved = recipe(make_recipe, extra)
        prepare(resolved)
        results[name] = record_ranks(resolved, 1, {"small": SmallChunks()})[0][:1]
    exact = results.pop("exact")
    apart, fused = (
        {quantity: worst for quantity, (worst, _) in compare(each, exact).items()} for each in results.values()
    )
    for quantity in ("loss", "norm"):
        assert fused[quantity] <= max(1.5 * apart[quantity], 1e-3)
    assert 1e-4 < fused["gradients"] <= 1.5 * apart["gradients"]


BF16 = {"precision": {"compute": "bf16"}}
