"""Attention inside of documents in compiled code: batches differ in how many documents they hold."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from camshaft_kernels.providers import documents

LAYOUTS = (
    [[0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]],
    [[0, 0, 1, 1, 2, 2, 2, 2], [0, 0, 0, 0, 0, 0, 0, 0]],
    [[0, 1, 2, 3, 4, 5, 6, 7], [0, 0, 0, 0, 0, 0, 0, 0]],
    [[0, 0, 0, 0, 0, 0, 0, 1], [0, 0, 1, 1, 1, 1, 1, 2]],
)


@torch.library.custom_op("camshaft_tests::counted", mutates_args=())
def counted(q: Tensor, bounds: Tensor) -> Tensor:
    """``q`` times the number of documents, opaque to a compiler as the kernel is."""
    return q * (bounds.numel() - 1)


@counted.register_fake
def _(q, bounds):
    return torch.empty_like(q)


@pytest.fixture
def stand_in(monkeypatch):
    """On a CPU there is no kernel of the kind."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(varlen, "varlen_attn", lambda q, k, v, bounds, *rest, **named: counted(q, bounds))


def test_one_graph_takes_any_number_of_documents(stand_in):
    counter = CompileCounter()
    attend = torch.compile(
        lambda hidden, mask: documents.varlen_attention(hidden, hidden, hidden, mask) + 1,
        backend=counter,
        dynamic=False,
        fullgraph=True,
    )
    found = [float(attend(torch.ones(2, 8, 2, 4), documents.spans(torch.tensor(each))).max()) for each in LAYOUTS]
    assert found == [3.0, 5.0, 10.0, 6.0]
    assert counter.frame_count == 1
