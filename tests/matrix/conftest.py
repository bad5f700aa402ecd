"""What ranks would import anew, each for half a second of the processor, they are forked with; the page of results."""

import pytest
import tokenizers  # noqa: F401
import torch._dynamo
import torch._inductor  # noqa: F401
from matrix_cases import CASES, FULL, everything, promised
from matrix_page import PAGE, render
from matrix_runs import refusal

import camshaft_zero.fully_shard
import camshaft_zero.native  # noqa: F401


@pytest.fixture(scope="session")
def results():
    """Worst relative error by quantity of each combination that was trained in this run."""
    return {}


@pytest.fixture
def page(make_recipe, results):
    """Where a test puts what it measured; when the last combination of a full set is there, the page is written."""
    yield results
    wanted = everything()
    if FULL and results.keys() >= set(CASES):
        refused = {each: refusal(make_recipe, each) for each in wanted if not promised(each)}
        PAGE.write_text(render(results, refused), encoding="utf-8")
