"""Matrix products divided over ranks train as one plain process does: gradients, norm, weights, state, loss."""

import pytest
from tensor_cases import check, reference, train


@pytest.mark.parametrize("sequence", [False, True], ids=["whole", "sequence"])
@pytest.mark.parametrize("degree", [2, 4])
def test_parity(make_recipe, degree, sequence):
    wanted = reference(make_recipe)
    ranks = train(make_recipe, degree, tensor={"sequence_parallel": sequence})
    check(ranks, wanted)
