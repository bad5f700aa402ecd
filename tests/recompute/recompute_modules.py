"""A module with all that is hard to run again, and what the tests of single modules share."""

import torch
from torch import nn

from camshaft_recompute.kinds import makes, of_kinds
from camshaft_recompute.region import Region
from camshaft_recompute.tally import Tally

CPU = torch.device("cpu")


class Net(nn.Module):
    """Dropout, a layer that is used twice, inputs in nests, a result that is written into."""

    def __init__(self):
        super().__init__()
        self.norm, self.twice, self.down = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.drop = nn.Dropout(0.3)
        self.calls = 0

    def forward(self, hidden, more, *, scale):
        self.calls += 1
        out = self.twice(torch.tanh(self.twice(self.norm(hidden) + more["shift"][0])))
        out = self.drop(torch.nn.functional.silu(out))
        made = self.down(out)
        made.mul_(scale)
        return hidden + torch.sigmoid(made), out.detach()


def build(seed=3):
    torch.manual_seed(seed)
    return Net().double()


def inputs():
    torch.manual_seed(4)
    hidden, shift = (torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    return hidden, shift


def run(net, autocast=None):
    """Gradients of two steps in a row, and the numbers that the generator has for who comes next."""
    hidden, shift = inputs()
    torch.manual_seed(5)
    made, _ = net(hidden, {"shift": (shift, None)}, scale=1.5)
    after = torch.rand(2)
    made, _ = net(made, {"shift": (shift, None)}, scale=0.5)
    made.square().sum().backward()
    return [hidden.grad, shift.grad, *(each.grad for each in net.parameters()), after, torch.rand(2)]


KEEP = {
    "full": None,
    "products": of_kinds(("products",)),
    "several": of_kinds(("products", "norms", "activations")),
    "by name": of_kinds(("aten.addmm", "aten.ta*")),
    "everything": makes,
}


def region(net, keep=None, name="net"):
    found = Region(name, net, CPU, Tally(), keep)
    found.install()
    return found


def assert_equal(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)
