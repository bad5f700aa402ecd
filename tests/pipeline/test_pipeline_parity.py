"""Every schedule on 2 and 4 ranks against a plain loop in one process: gradients, norm, weights, state, loss."""

import pipeline_runs as runs
import pytest


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_1f1b(make_recipe, tied):
    model = {"tie_word_embeddings": tied}
    wanted = runs.reference(runs.recipe(make_recipe, 1, model=model))
    runs.assert_equal(runs.recipe(make_recipe, 2, {}, model=model), 2, wanted)
