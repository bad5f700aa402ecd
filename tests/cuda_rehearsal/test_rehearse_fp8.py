"""What a GPU does to fp8 layers, without one: autocast around them, a compiler that takes them, tensors that claim to
be on a GPU and have no memory. These are stand-ins: no product of 8-bit numbers is made, and nothing is timed.
"""

import pytest
import torch
from torch import nn

from camshaft_precision import scaled
from camshaft_precision.linear import forward_of


class Block(nn.Module):
    """Two fp8 layers, with a residual that hides it when their branch loses its gradient."""

    def __init__(self, *, rowwise, wide):
        super().__init__()
        self.norm, self.one = nn.RMSNorm(32), nn.Linear(32, 48, bias=False)
        self.other = nn.Linear(48, 32, bias=False)
        for layer in (self.one, self.other):
            layer.forward = forward_of(layer, rowwise=rowwise, wide=wide, meter=None)

    def forward(self, hidden):
        return hidden + self.other(torch.relu(self.one(self.norm(hidden))))


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's compiler does so
@pytest.mark.parametrize("kernel", [True, False], ids=["as on a GPU", "as on an old CPU"])
@pytest.mark.parametrize(("rowwise", "wide"), [(False, False), (True, False), (True, True)])
def test_compiled_layers_under_autocast_keep_their_gradients(rowwise, wide, kernel, monkeypatch):
    """torch 2.11 cannot trace ``F.scaled_mm``, and lost the gradient of a product that autocast had rounded."""
    if kernel and torch.__version__ < "2.13":
        pytest.skip("torch makes 8-bit products on CPUs from 2.13 on")
    monkeypatch.setattr(scaled, "_CPU_KERNEL", kernel)
    torch.manual_seed(0)
    block = Block(rowwise=rowwise, wide=wide)
    hidden = torch.randn(2, 16, 32)
    found = []
    for call in (block, torch.compile(block, backend="eager", fullgraph=True, dynamic=False)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = call(hidden.clone().requires_grad_()).float().square().sum()
        found.append(torch.autograd.grad(loss, list(block.parameters())))
    for plain, compiled in zip(*found, strict=True):
        assert plain.abs().max() > 0 and torch.equal(plain, compiled)


def test_products_are_in_a_graph_that_claims_to_be_on_a_gpu():
    """Traced with fake tensors: every product becomes one node that Inductor knows, and its shape rules hold."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    targets = []

    def backend(graph, examples):
        targets.extend(str(node.target) for module in graph.modules() for node in module.graph.nodes)
        return graph.forward

    def both(a, b, rowwise):
        pair = [scaled.quantise(each, scaled.E4M3, rowwise=rowwise) for each in (a, b)]
        return scaled.product(*pair, fast=True)

    with FakeTensorMode():
        a, b = torch.empty(13, 32, device="cuda"), torch.empty(48, 32, device="cuda")
        for rowwise in (False, True):
            made = torch.compile(both, backend=backend, fullgraph=True)(a, b, rowwise)
            assert made.shape == (13, 48) and made.dtype == torch.bfloat16 and made.device.type == "cuda"
    assert sum("_scaled_mm" in target for target in targets) == 2
