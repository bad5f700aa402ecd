"""One process, 2 and 4 ranks against a plain loop on the same global batches: gradients, norm, weights, state, loss."""

import pytest
import torch

from camshaft.data import prepare
from camshaft.plugin import Plugin, hookimpl
from camshaft.testing.compare import assert_bit_equal, assert_within, compare
from camshaft.testing.reference import plain_run
from camshaft.testing.run import record_ranks as train
from references import (
    ADAMW,
    EXACT,
    FP32,
    LINEAR,
    OPTIMIZERS,
    SGD,
    Variant,
    change,
    groups,
    linear,
    torch_adamw,
    torch_sgd,
)

pytestmark = pytest.mark.broad

BOUNDS = {"fp64": EXACT, "fp32": FP32}
"""Weights after Adam steps divide by square roots of tiny second moments; they stay under the same gate."""


def plugins(optimizer, compute, max_norm=0.1):
    return {
        **optimizer,
        **LINEAR,
        "clip": {"max_norm": max_norm},
        "precision": {"compute": compute},
    }


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("compute", ["fp64", "fp32"])
@pytest.mark.parametrize("packed", [False, True], ids=["one-document-a-row", "packed"])
def test_ranks_and_accumulation_change_nothing(make_recipe, optimizer, compute, packed):
    settings, build = OPTIMIZERS[optimizer]
    results = {}
    for world_size in (1, 2, 4):
        resolved = make_recipe(plugins(settings, compute), world_size)
        if packed:
            data = resolved.tree["data"] | {"pack": True, "document_mask": True}
            resolved = make_recipe(plugins(settings, compute), world_size, data=data)
        if world_size == 1:
            reference = plain_run(resolved, prepare(resolved), build, compute=compute, max_norm=0.1, factor=linear)
        results[world_size] = train(resolved, world_size)
    clipped = [record.norm > 0.1 for record in reference]
    assert all(clipped), "clipping must be active in every step"
    samples = 235 if not packed else None
    assert samples is None or len(reference) == -(-samples // 12) == 20
    for ranks in results.values():
        assert_within(compare(ranks[0], reference), BOUNDS[compute])
        for other in ranks[1:]:
            assert_bit_equal(ranks[0], other)


def variant_reference(resolved, compute, **changes):
    return plain_run(
        resolved,
        prepare(resolved),
        torch_adamw,
        compute=compute,
        max_norm=0.1,
        factor=linear,
        prepare=lambda model: change(model, **changes),
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"frozen": ("layers.1.", "norm"), "unused": False},
        {"frozen": ("embed_tokens",), "unused": True},
    ],
    ids=["frozen-layers", "frozen-tied-and-unused"],
)
def test_frozen_tied_and_unused_parameters(make_recipe, changes):
    settings = plugins(ADAMW, "fp64")
    reference = variant_reference(make_recipe(settings), "fp64", **changes)
    for world_size in (1, 2):
        ranks = train(make_recipe(settings, world_size), world_size, {"variant": Variant(**changes)})
        assert_within(compare(ranks[0], reference), BOUNDS["fp64"])
        for other in ranks[1:]:
            assert_bit_equal(ranks[0], other)
    first, last = reference[0], reference[-1]
    for name in first.weights:
        if any(part in name for part in changes["frozen"]) or name == "unused":
            assert torch.equal(first.weights[name], last.weights[name]), f"{name} moved"
            assert not any(key.startswith(f"{name}/") for key in last.optimizer)


def test_untied_embeddings_bias_and_qk_norm(make_recipe):
    settings = plugins(SGD, "fp64")
    model = make_recipe(settings).tree["model"] | {
        "tie_word_embeddings": False,
        "attention_bias": True,
        "qk_norm": True,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    resolved = make_recipe(settings, model=model)
    reference = plain_run(resolved, prepare(resolved), torch_sgd, compute="fp64", max_norm=0.1, factor=linear)
    ranks = train(make_recipe(settings, 2, model=model), 2)
    assert_within(compare(ranks[0], reference), BOUNDS["fp64"])


def test_bf16_stays_within_its_stated_bound(make_recipe):
    settings = plugins(ADAMW, "bf16")
    resolved = make_recipe(settings)
    reference = plain_run(resolved, prepare(resolved), torch_adamw, compute="bf16", max_norm=0.1, factor=linear)
    ranks = train(make_recipe(settings, 2), 2)
    # The bounds for bf16 autocast measured over accumulation, data and tensor parallel, rounded up once.
    assert_within(compare(ranks[0], reference), {"loss": 1e-3, "norm": 5e-3, "weights": 1e-2})
    assert all(tensor.dtype == torch.float32 for tensor in ranks[0][-1].weights.values()), "masters are fp32"


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_without_clipping_and_accumulation(make_recipe, optimizer):
    settings, build = OPTIMIZERS[optimizer]
    if optimizer == "sgd":
        # Unclipped, momentum on top of this rate makes the training itself chaotic, and chaos amplifies any noise.
        settings, build = {"sgd": {"lr": 0.02}}, lambda model: torch.optim.SGD(groups(model, 0.0), lr=0.02)
    chosen = plugins(settings, "fp64", max_norm=1e9)
    resolved = make_recipe(chosen, accumulation=1)
    reference = plain_run(resolved, prepare(resolved), build, compute="fp64", max_norm=1e9, factor=linear)
    ranks = train(make_recipe(chosen, 2, accumulation=1), 2)
    assert_within(compare(ranks[0], reference), BOUNDS["fp64"])


def test_overlap_and_bucket_size_are_bit_equal(make_recipe):
    runs = []
    for ddp in ({"bucket_size_mb": 0.005}, {"bucket_size_mb": 0.005, "overlap": False}, {"bucket_size_mb": 25.0}):
        runs.append(train(make_recipe({**plugins(ADAMW, "fp32"), "ddp": ddp}, 2), 2)[0])
    assert_bit_equal(runs[0], runs[1])
    assert_bit_equal(runs[0], runs[2])


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_the_gates_see_a_factor_on_all_gradients(make_recipe, scale):
    """Adam hides a factor from the loss; the comparison of raw gradients must not."""
    settings = plugins(ADAMW, "fp64", max_norm=1e9)
    resolved = make_recipe(settings)
    reference = plain_run(resolved, prepare(resolved), torch_adamw, compute="fp64", max_norm=1e9, factor=linear)
    records = train(make_recipe(settings), 1, {"bug": ScalesGradients(scale)})[0]
    worst = compare(records, reference)
    assert worst["gradients"][0] > 0.4 and worst["norm"][0] > 0.4
    assert worst["loss"][0] < 1e-3, "which the loss alone would have let through"


class ScalesGradients(Plugin):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    @hookimpl
    def reduce(self, state):
        for parameter in state.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(self.scale)
