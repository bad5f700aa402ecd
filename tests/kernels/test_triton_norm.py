"""RMSNorm, alone and of a sum."""

import pytest
import torch
from triton_cases import compare, outcome, randn, same_twice

from camshaft import ops

TRITON = "interpreted"
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5
SHAPES = [(1, 2), (3, 7, 37), (2, 5, 256), (501, 3), (2, 3, 4, 6), (203, 100), (5, 5000)]
"""The last two: several tiles a program in the backward, loaded ahead, and too wide for that in fp32 and fp64."""


def kernels():
    from camshaft_kernels.triton import norm

    return norm


def norm_alone(module):
    return lambda hidden, weight: module.rms_norm(hidden, weight, EPS)


def norm_of_sum(module):
    return lambda hidden, residual, weight: module.add_rms_norm(hidden, residual, weight, EPS)


def sum_rounded_to(dtype):
    """The norm is of the sum as it is returned, which is part of what both forms are: so fp64 takes that sum too."""

    def function(hidden, residual, weight):
        summed = residual + hidden
        summed = summed + (summed.to(dtype).double() - summed).detach()
        return ops.rms_norm(summed, weight, EPS), summed

    return function


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equal_to_torch(shape, dtype):
    weight = randn(shape[-1], dtype=dtype, seed=1)
    compare(norm_alone(kernels()), norm_alone(ops), randn(*shape, dtype=dtype), weight)
    terms = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype, seed=2)
    compare(norm_of_sum(kernels()), norm_of_sum(ops), *terms, weight, exactly=sum_rounded_to(dtype))


def test_more_partial_sums_of_the_weight_than_are_added_at_a_time(monkeypatch):
    """As many programs as on a GPU: one turn of the second kernel adds 128 of their rows."""
    norm = kernels()
    monkeypatch.setattr(norm, "processors", lambda device: 132)
    rows, columns = 2 * norm.PARTIAL_TILE[0] + 5, 1100
    tall, _, of_program, _ = norm.backward_launch(rows, columns, 8)
    assert tall == 1 and -(-norm.WARPS // of_program) * 132 > norm.PARTIAL_TILE[0]
    values = randn(rows, columns, dtype=torch.float64), randn(columns, dtype=torch.float64, seed=1)
    compare(norm_alone(norm), norm_alone(ops), *values)


def test_rows_of_one():
    """Their gradient is almost nothing, of which fp32 keeps few digits in any form."""
    values = randn(40, 1, dtype=torch.float64), randn(1, dtype=torch.float64)
    compare(norm_alone(kernels()), norm_alone(ops), *values)


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (0, 3, 5)], ids=str)
def test_no_rows(shape):
    weight = randn(shape[-1])
    for results in (
        compare(norm_alone(kernels()), norm_alone(ops), randn(*shape), weight),
        compare(norm_of_sum(kernels()), norm_of_sum(ops), randn(*shape), randn(*shape), weight),
    ):
        assert torch.equal(results[-1], torch.zeros_like(weight))


@pytest.mark.parametrize("hidden", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16], ids=str)
def test_mixed_dtypes(hidden, residual, weight):
    values = randn(5, 33, dtype=hidden), randn(5, 33, dtype=residual, seed=3), randn(33, dtype=weight)
    exactly = sum_rounded_to(torch.promote_types(hidden, residual))
    compare(norm_of_sum(kernels()), norm_of_sum(ops), *values, exactly=exactly)
    compare(norm_alone(kernels()), norm_alone(ops), values[0], values[2])


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)], ids=str)
def test_statistics_in_the_wider_dtype(dtypes):
    hidden, weight = randn(5, 33, dtype=dtypes[0]), randn(33, dtype=dtypes[1])
    results = compare(norm_alone(kernels()), norm_alone(ops), hidden, weight)
    assert results[0].dtype == torch.float64


def strided(kind):
    """[6, 4, 10] with other strides."""
    if kind == "columns of a wider matrix":
        return randn(6, 4, 25).detach()[..., 5:15].requires_grad_()
    if kind == "transposed rows":
        return randn(4, 6, 10).detach().transpose(0, 1).requires_grad_()
    if kind == "transposed columns":
        return randn(6, 10, 4).detach().transpose(1, 2).requires_grad_()
    return randn(6, 1, 10).detach().expand(6, 4, 10).requires_grad_()


@pytest.mark.parametrize("kind", ["columns of a wider matrix", "transposed rows", "transposed columns", "expanded"])
def test_strides(kind):
    weight = randn(20).detach()[::2].requires_grad_()
    compare(norm_alone(kernels()), norm_alone(ops), strided(kind), weight)
    compare(norm_of_sum(kernels()), norm_of_sum(ops), strided(kind), randn(6, 4, 10, seed=5), weight)
    compare(norm_of_sum(kernels()), norm_of_sum(ops), randn(6, 4, 10, seed=5), strided(kind), weight)


def test_upstream_of_any_strides():
    """What a sum, a transpose and a slice send back."""
    weight, hidden, residual = randn(10), randn(6, 4, 10), randn(6, 4, 10, seed=1)

    def mixed(module):
        def function(hidden, residual, weight):
            normed, summed = module.add_rms_norm(hidden, residual, weight, EPS)
            return normed.sum(), summed.transpose(0, 2).contiguous(), normed[..., 3:5].clone()

        return function

    compare(mixed(kernels()), mixed(ops), hidden, residual, weight)


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_used(used):
    values = randn(7, 12), randn(7, 12, seed=1)
    compare(
        lambda h, r: kernels().add_rms_norm(h, r, torch.ones(12, device=h.device), EPS)[used],
        lambda h, r: ops.add_rms_norm(h, r, torch.ones(12, dtype=h.dtype, device=h.device), EPS)[used],
        *values,
    )


def test_weight_unused_where_only_the_sum_is():
    hidden, residual, weight = randn(7, 12), randn(7, 12, seed=1), randn(12)
    kernels().add_rms_norm(hidden, residual, weight, EPS)[1].sum().backward()
    assert weight.grad is None
    assert torch.equal(hidden.grad, torch.ones_like(hidden))
    assert hidden.grad.data_ptr() != residual.grad.data_ptr()


def test_used_twice():
    """One weight in two norms, one tensor as both terms."""

    def twice(module):
        def function(hidden, weight):
            normed, summed = module.add_rms_norm(hidden, hidden, weight, EPS)
            return module.rms_norm(normed + summed, weight, EPS)

        return function

    compare(twice(kernels()), twice(ops), randn(9, 21), randn(21))


def test_backward_twice():
    hidden, weight = randn(9, 21), randn(21)
    normed = kernels().rms_norm(hidden, weight, EPS)
    first = torch.autograd.grad(normed.sum(), (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(normed.sum(), (hidden, weight))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen(frozen):
    values = [randn(9, 21), randn(21)]
    values[frozen].requires_grad_(False)
    assert len(compare(norm_alone(kernels()), norm_alone(ops), *values)) == 2


def test_many_rows_to_a_program():
    """More tiles than programs, the last of them not full; the same bits each time."""
    hidden, weight = randn(4999, 11), randn(11)
    compare(norm_alone(kernels()), norm_alone(ops), hidden, weight)
    same_twice(norm_alone(kernels()), hidden, weight)
    same_twice(norm_of_sum(kernels()), hidden, randn(4999, 11, seed=3), weight)


def test_rows_of_zeros_and_of_large_numbers():
    hidden = randn(6, 64, dtype=torch.bfloat16)
    hidden.data[1], hidden.data[2] = 0.0, 3e4
    compare(norm_alone(kernels()), norm_alone(ops), hidden, randn(64, dtype=torch.bfloat16))
    assert not kernels().rms_norm(hidden, randn(64), EPS)[1].any()


def test_only_the_backward_of_a_backward_is_missing():
    hidden, weight, factor = randn(3, 8), randn(8), randn(1)
    normed = kernels().rms_norm(hidden, weight, EPS) * factor
    (gradient,) = torch.autograd.grad(normed.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_too_wide():
    with pytest.raises(ValueError, match="65537 elements are wider"):
        kernels().rms_norm(
            torch.zeros(1, 65537, device=randn(1).device), torch.ones(65537, device=randn(1).device), EPS
        )


@pytest.mark.parametrize(
    ("residual", "weight"), [((1, 3, 8), (8,)), ((2, 3, 8), (7,)), ((2, 3, 8), (1, 8)), ((3, 8), (8,))], ids=str
)
def test_shapes_that_would_be_read_beyond_their_ends(residual, weight):
    hidden = randn(2, 3, 8)
    with pytest.raises(ValueError, match="a norm takes"):
        kernels().add_rms_norm(hidden, randn(*residual), randn(*weight), EPS)
    if weight != (8,):
        with pytest.raises(ValueError, match="a norm takes"):
            kernels().rms_norm(hidden, randn(*weight), EPS)


def test_kept_for_the_backward():
    """The input itself and one number a row."""
    kept = []
    hidden, weight = randn(16, 32), randn(32)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        results = outcome(norm_alone(kernels()), (hidden, weight))
    assert len(results) == 3
    assert sorted(tensor.numel() for tensor in kept) == [16, 32, 16 * 32]
    assert {hidden.data_ptr(), weight.data_ptr()} < {tensor.data_ptr() for tensor in kept}
