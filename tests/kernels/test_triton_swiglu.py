"""silu(gate) * up."""

import pytest
import torch
from triton_cases import compare, randn, same_twice

from camshaft import ops

TRITON = "interpreted"
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def kernel(gate, up):
    from camshaft_kernels.triton import swiglu

    return swiglu.swiglu(gate, up)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 7, 37), (2, 5000), (301, 3), (2, 3, 4, 64)], ids=str)
def test_equal_to_torch(shape, dtype):
    compare(kernel, ops.swiglu, randn(*shape, dtype=dtype, scale=2.0), randn(*shape, dtype=dtype, seed=1))


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 6)], ids=str)
def test_empty(shape):
    compare(kernel, ops.swiglu, randn(*shape), randn(*shape))


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_mixed_dtypes(dtypes):
    """torch rounds silu(gate) to the gate's dtype on the way; the kernel does not, so it is held by fp64 alone."""
    gate, up = (randn(5, 33, dtype=dtype) for dtype in dtypes)
    wide = lambda gate, up: ops.swiglu(gate.float() if gate.dtype != torch.float64 else gate, up)  # noqa: E731
    results = compare(kernel, wide, gate, up)
    assert results[0].dtype == torch.float32


def test_strides():
    """Halves of one projection, transposed, and expanded."""
    joined = randn(6, 4, 74)
    compare(lambda both: kernel(*both.chunk(2, -1)), lambda both: ops.swiglu(*both.chunk(2, -1)), joined)
    compare(kernel, ops.swiglu, randn(10, 6).detach().t().requires_grad_(), randn(6, 10))
    compare(kernel, ops.swiglu, randn(6, 10), randn(1, 10).detach().expand(6, 10).requires_grad_())


def test_upstream_of_any_strides():
    compare(
        lambda g, u: kernel(g, u).t().contiguous(),
        lambda g, u: ops.swiglu(g, u).t().contiguous(),
        randn(6, 9),
        randn(6, 9, seed=1),
    )
    compare(lambda g, u: kernel(g, u).sum(), lambda g, u: ops.swiglu(g, u).sum(), randn(6, 9), randn(6, 9, seed=1))


def test_far_from_zero():
    """Neither exponential of a large number may become an infinity times 0."""
    gate = torch.tensor([-200.0, -90.0, -20.0, 0.0, 20.0, 90.0, 200.0], device=randn(1).device).requires_grad_()
    compare(kernel, ops.swiglu, gate, randn(7))


def test_used_twice_and_as_both():
    compare(lambda x: kernel(kernel(x, x), x), lambda x: ops.swiglu(ops.swiglu(x, x), x), randn(5, 12))


def test_same_twice():
    same_twice(kernel, randn(9, 301), randn(9, 301, seed=1))


def test_kept_for_the_backward():
    """Gate and up, and nothing besides."""
    kept = []
    gate, up = randn(4, 10), randn(4, 10, seed=1)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        kernel(gate, up)
    assert [tensor.data_ptr() for tensor in kept] == [gate.data_ptr(), up.data_ptr()]


def test_refused():
    with pytest.raises(ValueError, match="one shape"):
        kernel(randn(3, 4), randn(4))
