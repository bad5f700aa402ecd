"""``torch.compile`` takes every kernel into one graph, forward and backward.

Where there is no GPU, tensors of the host are only traced: nothing is launched, so the checks of devices are taken out.
"""

from contextlib import ExitStack
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux alone")

TRITON = "compiled"
GPU = torch.cuda.is_available()


def tensor(*shape, dtype=torch.bfloat16, gradient=True):
    return torch.randn(*shape, dtype=dtype, device="cuda" if GPU else "cpu").requires_grad_(gradient)


def block(hidden, residual, weight, gate, up, q, k, cos, sin):
    """The operations of one layer."""
    from camshaft_kernels.triton import norm, rope, swiglu

    normed, summed = norm.add_rms_norm(hidden, residual, weight, 1e-5)
    q, k = rope.rope(q, k, (cos, sin), torch.bfloat16)
    return norm.rms_norm(normed, weight, 1e-5).sum() + summed.sum() + swiglu.swiglu(gate, up).sum() + q.sum() + k.sum()


def losses(hidden, weight, logits, labels):
    from camshaft_kernels.triton import head, loss

    return head.linear_cross_entropy(hidden, weight, labels, chunk_bytes=1) + loss.cross_entropy(logits, labels)


CASES = {
    block: lambda: (
        tensor(2, 64, 96), tensor(2, 64, 96), tensor(96, dtype=torch.float32), tensor(2, 64, 160), tensor(2, 64, 160),
        tensor(2, 64, 4, 32), tensor(2, 64, 2, 32), tensor(2, 64, 1, 32, gradient=False),
        tensor(2, 64, 1, 32, gradient=False),
    ),
    losses: lambda: (
        tensor(2, 100, 32), tensor(50, 32), tensor(2, 100, 50),
        torch.randint(0, 50, (2, 100), device="cuda" if GPU else "cpu"),
    ),
}  # fmt: skip
KERNELS = {block: 10, losses: 4}
"""Launches forward and backward: two norms with their weights' gradients, one rotation and one gate; two chunks, and a
loss of logits.
"""


def traced(function, inputs):
    """Graphs that Dynamo makes of the function on tensors that have no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from camshaft_kernels.triton import adamw, head, loss, norm, rope, swiglu

    graphs = []

    def backend(graph, examples):
        graphs.append(graph)
        return graph.forward

    with ExitStack() as stack:
        stack.enter_context(patch("torch.utils._triton.has_triton", lambda: True))
        for module in (adamw, head, loss, norm, rope, swiglu):
            stack.enter_context(patch.object(module, "check", lambda *tensors: None))
        mode = stack.enter_context(FakeTensorMode())
        torch.compile(function, backend=backend, fullgraph=True)(*[mode.from_tensor(each) for each in inputs])
    return graphs


def launches(graph):
    """How many kernels a graph launches, in the graphs inside it too."""
    modules = [module for module in graph.modules() if isinstance(module, torch.fx.GraphModule)]
    return sum("triton_kernel_wrapper" in str(node.target) for module in modules for node in module.graph.nodes)


@pytest.mark.parametrize("function", list(CASES), ids=lambda function: function.__name__)
@pytest.mark.skipif(GPU, reason="a GPU compiles and runs it, below")
def test_traced_into_one_graph(function):
    torch.manual_seed(0)
    graphs = traced(function, CASES[function]())
    assert len(graphs) == 1
    assert launches(graphs[0]) == KERNELS[function]


@pytest.mark.parametrize("function", list(CASES), ids=lambda function: function.__name__)
@pytest.mark.skipif(not GPU, reason="needs a GPU; without one it is traced, above")
def test_compiled_equals_eager(function):
    torch.manual_seed(0)
    inputs = CASES[function]()
    leaves = [value for value in inputs if value.requires_grad]
    results = []
    for form in (function, torch.compile(function, fullgraph=True)):
        out = form(*inputs)
        results.append([out.detach(), *torch.autograd.grad(out, leaves)])
    for eager, compiled in zip(*results, strict=True):
        assert torch.allclose(eager.float(), compiled.float(), rtol=1e-2, atol=1e-3)
