"""On a GPU: random numbers of the device, memory that is really given back, and copies beside computation."""

import pytest
import torch
from torch import nn

from camshaft_recompute.kinds import of_kinds
from camshaft_recompute.offload import Line, Offloaded
from camshaft_recompute.region import Region
from camshaft_recompute.tally import Tally

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LAYERS, WIDTH, TOKENS = 6, 1024, 4096


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(WIDTH), nn.Dropout(0.2)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, hidden):
        return hidden + self.drop(self.down(nn.functional.gelu(self.up(self.norm(hidden)))))


def run(install):
    """(bytes that a forward holds, gradients, whether anything differed between three backwards)."""
    torch.manual_seed(1)
    layers = nn.Sequential(*(Layer() for _ in range(LAYERS))).cuda()
    regions = [install(str(number), layer) for number, layer in enumerate(layers)]
    for each in regions:
        if each is not None:
            each.install()
    found = []
    for _ in range(3):
        torch.manual_seed(2)
        first = torch.randn(TOKENS, WIDTH, device="cuda", requires_grad=True)
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            made = layers(first)
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated() - before
        layers.zero_grad(set_to_none=True)
        made.float().square().sum().backward()
        found.append([first.grad.clone(), *(each.grad.clone() for each in layers.parameters())])
        del made
    assert all(torch.equal(one, other) for one, other in zip(found[0], found[2], strict=True))
    return held, found[2]


@pytest.fixture(scope="module")
def plain():
    return run(lambda name, layer: None)


CUDA = torch.device("cuda")


def away():
    line = Line(CUDA, lambda: (0, 0))
    return lambda name, layer: Offloaded(name, layer, CUDA, Tally(), 2**16, line)


INSTALL = {
    "full": lambda: lambda name, layer: Region(name, layer, CUDA, Tally(), None),
    "selective": lambda: lambda name, layer: Region(name, layer, CUDA, Tally(), of_kinds(("products",))),
    "offload": away,
}
LEAST = {"full": 0.85, "selective": 0.4, "offload": 0.8}
"""Part of the plain forward's bytes that is saved, at least."""


@pytest.mark.parametrize("mode", INSTALL)
def test_gradients_are_equal_and_memory_is_given_back(plain, mode):
    held, gradients = run(INSTALL[mode]())
    assert all(torch.equal(one, other) for one, other in zip(gradients, plain[1], strict=True))
    assert held < (1 - LEAST[mode]) * plain[0]
