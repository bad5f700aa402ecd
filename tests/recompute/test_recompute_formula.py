"""Korthikanti et al. (arXiv:2205.05198): bytes of activations by the formula, and counted in memory, equal to the byte.

Of the paper's layer torch's autograd keeps all that the formula has, and one thing more, which the paper leaves out as
small: mean and inverse deviation of each layer norm, 4 numbers a token and layer. Two things must be asked for: a mask
of one byte (``native_dropout``, which is what CUDA runs; on a CPU torch keeps dropout's mask in two bytes), and scores
that are scaled by a number (a scale in a tensor would be kept beside the scores).
"""

import math

import pytest
import torch
from test_recompute_bytes import Living
from torch import nn

from camshaft_recompute.formula import GPT3_175B, Gpt
from camshaft_recompute.kinds import of_kinds
from camshaft_recompute.region import Region
from camshaft_recompute.tally import Tally

CPU = torch.device("cpu")
SHAPE = Gpt(layers=3, sequence=48, batch=2, hidden=32, heads=4)


def drop(hidden):
    return torch.native_dropout(hidden, 0.1, True)[0]


class Core(nn.Module):
    """Scores, softmax, dropout and the sum of values: what the paper makes again."""

    def __init__(self, shape):
        super().__init__()
        self.heads = shape.heads
        self.register_buffer("later", torch.ones(shape.sequence, shape.sequence, dtype=torch.bool).triu(1))

    def forward(self, q, k, v):
        q, k, v = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (q, k, v))
        scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(self.later, float("-inf"))
        return (drop(scores.softmax(-1)) @ v).transpose(1, 2).flatten(2)


class Layer(nn.Module):
    """Section 4.1: layer norms, attention with dropout, an MLP of four times the width with GELU."""

    def __init__(self, shape):
        super().__init__()
        hidden = shape.hidden
        self.norm, self.other = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.q, self.k, self.v, self.out = (nn.Linear(hidden, hidden) for _ in range(4))
        self.core = Core(shape)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, hidden):
        normed = self.norm(hidden)
        hidden = hidden + drop(self.out(self.core(self.q(normed), self.k(normed), self.v(normed))))
        return hidden + drop(self.down(nn.functional.gelu(self.up(self.other(hidden)))))


def layers():
    torch.manual_seed(1)
    return nn.ModuleList(Layer(SHAPE) for _ in range(SHAPE.layers)).bfloat16()


def statistics():
    """Mean and inverse deviation of both norms of each layer."""
    hidden = torch.zeros(SHAPE.batch, SHAPE.sequence, SHAPE.hidden, dtype=torch.bfloat16)
    _, *both = torch.native_layer_norm(hidden, (SHAPE.hidden,), None, None, 1e-5)
    return SHAPE.layers * 2 * sum(each.nbytes for each in both)


def held(model):
    """Bytes that a forward holds: what lives but for the last result, and with the first input. And its gradients."""
    torch.manual_seed(2)
    first = torch.randn(SHAPE.batch, SHAPE.sequence, SHAPE.hidden, dtype=torch.bfloat16, requires_grad=True)
    hidden = first
    with Living() as living:
        for layer in model:
            hidden = layer(hidden)
    size = living.bytes() - hidden.nbytes + first.nbytes
    hidden.sum().backward()
    return size, [first.grad, *(each.grad for each in model.parameters())]


def recomputed(choose, keep=None):
    model = layers()
    for layer in model:
        Region("layer", choose(layer), CPU, Tally(), keep).install()
    return held(model)


@pytest.fixture(scope="module")
def plain():
    return held(layers())


def test_without_recomputation(plain):
    assert plain[0] - statistics() == SHAPE.everything


@pytest.mark.parametrize(
    ("choose", "expected"),
    [
        (lambda layer: layer, lambda: SHAPE.full),
        (lambda layer: layer.core, lambda: SHAPE.selective + statistics()),
    ],
    ids=["full", "selective"],
)
def test_with_recomputation(plain, choose, expected):
    size, gradients = recomputed(choose)
    assert size == expected()
    assert all(torch.equal(one, other) for one, other in zip(gradients, plain[1], strict=True))


def test_keeping_products_alone_holds_still_less(plain):
    """Layers that keep their input and the results of products: 2 + 2 for q, k, v, out and the MLP's last one each (its
    dropout behind it has a mask to make) + 8 for the MLP's first one.
    """
    size, gradients = recomputed(lambda layer: layer, of_kinds(("products",)))
    unit = SHAPE.full / 2
    assert size == unit * (2 + 5 * 2 + 8)
    assert all(torch.equal(one, other) for one, other in zip(gradients, plain[1], strict=True))


def test_gpt3():
    """Section 5: attention's core is 70 % of the activations of GPT-3 at 2,048 tokens (5 a s / h = 80)."""
    assert GPT3_175B.scores / (GPT3_175B.everything - GPT3_175B.scores) == pytest.approx(80 / 34)
    assert 1 - GPT3_175B.selective / GPT3_175B.everything == pytest.approx(0.70, abs=0.005)
    assert GPT3_175B.full == 2 * 96 * 2048 * 12288
