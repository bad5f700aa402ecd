"""Attention inside of documents without a mask: the same numbers as with one, whatever the documents are like."""

import pytest
import torch

from camshaft import ops
from camshaft.data import prepare
from camshaft.testing.compare import assert_within, compare
from camshaft.testing.run import record_ranks
from camshaft_kernels.providers.documents import segment_attention, segments, spans

CASES = {
    "uneven": [[0, 0, 0, 1, 2, 2, 2, 2, 2], [0, 0, 1, 1, 1, 1, 1, 1, 5]],
    "one-each": [[0] * 9, [3] * 9],
    "single-tokens": [list(range(9)), list(range(4, 13))],
    "one-row": [[0, 0, 0, 0, 1, 1, 1, 1, 1]],
}


def heads(rows, length, dtype=torch.float64):
    generator = torch.Generator().manual_seed(length)
    shapes = ((rows, length, 4, 6), (rows, length, 2, 6), (rows, length, 2, 6))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("case", CASES)
def test_segments_are_what_the_mask_is(case):
    document = torch.tensor(CASES[case], dtype=torch.int32)
    leaves = heads(*document.shape)
    wanted = ops.document_attention(*leaves, ops.document_mask(document))
    made = segment_attention(*leaves, segments(document))
    assert made.shape == wanted.shape
    upstream = torch.randn(made.shape, dtype=made.dtype)
    grads = [torch.autograd.grad(each, leaves, upstream) for each in (made, wanted)]
    torch.testing.assert_close([made, *grads[0]], [wanted, *grads[1]], rtol=1e-12, atol=1e-13)


def test_bounds_reach_over_rows():
    found = spans(torch.tensor(CASES["uneven"], dtype=torch.int32))
    assert found.bounds.tolist() == [0, 3, 4, 9, 11, 17, 18] and found.bounds.dtype == torch.int32 and found.row == 9


def test_documents_in_pieces_are_refused():
    """The mask lets the last token see the first two; lengths could not say so."""
    with pytest.raises(ValueError, match="numbers fall along a row"):
        segments(torch.tensor([[0, 0, 1, 0]]))


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_with_segments_is_one_with_a_mask(make_recipe, world_size):
    def recipe(kernels, ranks):
        plugins = {
            "adamw": {"lr": 3e-3},
            "clip": {"max_norm": 0.1},
            "precision": {"compute": "fp64"},
            "kernels": kernels,
        }
        sections = {
            "training": {"max_steps": 3, "log_every": 1},
            "batch": {"micro_batch_size": 2, "global_batch_size": 4},
        }
        if ranks == 1:
            plugins["ddp"] = None
        data = make_recipe(plugins, ranks, **sections).tree["data"] | {"pack": True, "document_mask": True}
        return make_recipe(plugins, ranks, data=data, **sections)

    plain = recipe(None, 1)
    prepare(plain)
    (wanted,) = record_ranks(plain, 1)
    for records in record_ranks(recipe({"document_attention": "torch_segments"}, world_size), world_size, timeout_s=60):
        assert_within(compare(records, wanted), dict.fromkeys(("gradients", "norm", "weights", "loss"), 1e-12))
