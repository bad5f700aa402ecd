"""Matrix products divided over ranks train as one plain process does: gradients, norm, weights, state, loss."""

import pytest
from tensor_cases import check, reference, train

pytestmark = pytest.mark.broad


@pytest.mark.parametrize("sequence", [False, True], ids=["whole", "sequence"])
@pytest.mark.parametrize("degree", [2, 4])
def test_parity(make_recipe, degree, sequence):
    wanted = reference(make_recipe)
    ranks = train(make_recipe, degree, tensor={"sequence_parallel": sequence})
    check(ranks, wanted)


VARIANTS = {
    2: {"tie_word_embeddings": False, "attention_bias": True, "qk_norm": True},
    4: {"num_key_value_heads": 1, "attention_bias": True, "qk_norm": True},
}


@pytest.mark.parametrize("sequence", [False, True], ids=["whole", "sequence"])
@pytest.mark.parametrize("degree", VARIANTS)
def test_kinds_of_models(make_recipe, sequence, degree):
    """Untied tables, biases, norms of queries and keys, and one key/value head that all ranks share."""
    model = VARIANTS[degree]
    wanted = reference(make_recipe, optimizer="sgd", **model)
    ranks = train(make_recipe, degree, tensor={"sequence_parallel": sequence}, optimizer="sgd", **model)
    check(ranks, wanted)


@pytest.mark.parametrize(("stage", "sequence"), [(0, False), (1, True), (3, True)])
def test_with_data_parallel(make_recipe, stage, sequence):
    """Flat storage is cut at other places on each rank, because the vocabulary is not divisible."""
    wanted = reference(make_recipe, num_key_value_heads=1)
    plugins = {"zero": {"stage": stage}, "ddp": None} if stage else None
    tensor = {"sequence_parallel": sequence, "async": sequence}
    ranks = train(make_recipe, 2, data=2, tensor=tensor, plugins=plugins, num_key_value_heads=1)
    check(ranks, wanted)


@pytest.mark.parametrize("degree", [2, 4])
def test_overlap_changes_no_number(make_recipe, degree):
    model = {"attention_bias": True, "tie_word_embeddings": False}
    wanted = reference(make_recipe, **model)
    ranks = train(make_recipe, degree, tensor={"sequence_parallel": True, "async": True}, **model)
    check(ranks, wanted)
