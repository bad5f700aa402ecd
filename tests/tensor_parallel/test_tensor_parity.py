"""Matrix products divided over ranks train as one plain process does: gradients, norm, weights, state, loss."""

import pytest
from tensor_cases import check, reference, train


@pytest.mark.parametrize("sequence", [False, True], ids=["whole", "sequence"])
@pytest.mark.parametrize("degree", [2, 4])
def test_parity(make_recipe, degree, sequence):
    wanted = reference(make_recipe)
    ranks = train(make_recipe, degree, tensor={"sequence_parallel": sequence})
    check(ranks, wanted)


VARIANTS = {
    "untied-bias-qk_norm": {
        "tie_word_embeddings": False,
        "attention_bias": True,
        "qk_norm": True,
    },
    "one-key-head": {"num_key_value_heads": 1, "qk_norm": True, "attention_bias": True},
}


@pytest.mark.parametrize("sequence", [False, True], ids=["whole", "sequence"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("degree", [2, 4])
def test_kinds_of_models(make_recipe, variant, sequence, degree):
    model = VARIANTS[variant]
    wanted = reference(make_recipe, optimizer="sgd", **model)
    ranks = train(make_recipe, degree, tensor={"sequence_parallel": sequence}, optimizer="sgd", **model)
    check(ranks, wanted)


@pytest.mark.parametrize("sequence", [False, True], ids=["whole", "sequence"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_with_data_parallel(make_recipe, stage, sequence):
    wanted = reference(make_recipe, num_key_value_heads=1)
    plugins = {"zero": {"stage": stage}, "ddp": None} if stage else None
    ranks = train(
        make_recipe, 2, data=2, tensor={"sequence_parallel": sequence}, plugins=plugins, num_key_value_heads=1
    )
    check(ranks, wanted)
