"""Rotation of queries and keys in one launch."""

import pytest
import torch
from triton_cases import compare, randn, same_twice

from camshaft import ops

TRITON = "interpreted"
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def kernel(*arguments):
    from camshaft_kernels.triton import rope

    return rope.rope(*arguments)


def angles(batch, tokens, width, dtype=torch.float32):
    """Of all tokens, as the built-in model makes them."""
    turn = randn(batch, tokens, 1, width // 2, dtype=dtype, seed=9, scale=3.0).detach()
    return torch.cat((turn.cos(), turn.cos()), -1), torch.cat((-turn.sin(), turn.sin()), -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (5, 1), (8, 2), (3, 3)], ids=str)
@pytest.mark.parametrize("width", [2, 6, 64])
def test_equal_to_torch(heads, width, dtype):
    q, k = (randn(2, 7, count, width, dtype=dtype, seed=count) for count in heads)
    wide = torch.promote_types(dtype, torch.float32)
    compare(kernel, ops.rope, q, k, angles(2, 7, width, wide), dtype)


@pytest.mark.parametrize("shape", [(1, 7), (2, 1), (1, 1)], ids=str)
def test_angles_of_all_rows_or_tokens(shape):
    compare(kernel, ops.rope, randn(2, 7, 3, 10), randn(2, 7, 1, 10), angles(*shape, 10), torch.float32)


def test_angles_need_not_be_a_rotation():
    """Neither halves that are alike nor sines of two signs are taken for granted."""
    q, k = randn(2, 3, 4, 8), randn(2, 3, 2, 8)
    compare(kernel, ops.rope, q, k, (randn(2, 3, 1, 8).detach(), randn(2, 3, 1, 8, seed=1).detach()), torch.float32)


def test_backward_is_the_inverse():
    q, k = randn(2, 5, 3, 8, dtype=torch.float64), randn(2, 5, 1, 8, dtype=torch.float64)
    turned = kernel(q, k, angles(2, 5, 8, torch.float64), torch.float64)
    back = torch.autograd.grad(turned, (q, k), [value.detach() for value in turned])
    assert all(torch.allclose(one, other, rtol=0, atol=1e-14) for one, other in zip(back, (q, k), strict=True))


@pytest.mark.parametrize("asked", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("q", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [torch.float32, torch.bfloat16], ids=str)
def test_mixed_dtypes(q, k, asked):
    compare(kernel, ops.rope, randn(2, 3, 4, 6, dtype=q), randn(2, 3, 2, 6, dtype=k), angles(2, 3, 6), asked)


def test_angles_in_bf16():
    cos, sin = angles(2, 3, 6)
    q, k = randn(2, 3, 4, 6), randn(2, 3, 2, 6)
    compare(kernel, ops.rope, q, k, (cos.bfloat16(), sin.bfloat16()), torch.float32)


def test_strides():
    """One projection cut in three, heads before tokens, and every other element."""
    joined = randn(2, 5, 8, 12)
    compare(
        lambda joined, angles, dtype: kernel(joined[:, :, :5], joined[:, :, 5:7], angles, dtype),
        lambda joined, angles, dtype: ops.rope(joined[:, :, :5], joined[:, :, 5:7], angles, dtype),
        joined, angles(2, 5, 12), torch.float32,
    )  # fmt: skip
    before = [randn(2, heads, 5, 12).detach().transpose(1, 2).requires_grad_() for heads in (4, 2)]
    compare(kernel, ops.rope, *before, angles(2, 5, 12), torch.float32)
    every = [randn(2, 5, heads, 24).detach()[..., ::2].requires_grad_() for heads in (4, 2)]
    compare(kernel, ops.rope, *every, tuple(table[..., ::2] for table in angles(2, 5, 24)), torch.float32)


def test_upstream_of_any_strides():
    def turned(function):
        def transposed(*arguments):
            q, k = function(*arguments)
            return q.transpose(1, 2).contiguous(), k.sum()

        return transposed

    arguments = randn(2, 5, 4, 6), randn(2, 5, 2, 6), angles(2, 5, 6), torch.float32
    compare(turned(kernel), turned(ops.rope), *arguments)


def test_only_queries_are_used():
    arguments = randn(2, 5, 4, 6), randn(2, 5, 2, 6), angles(2, 5, 6), torch.float32
    kernel(*arguments)[0].sum().backward()
    assert not arguments[1].grad.any()
    assert arguments[0].grad.any()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)], ids=str)
def test_no_tokens(shape):
    compare(kernel, ops.rope, randn(*shape, 4, 6), randn(*shape, 2, 6), angles(*shape, 6), torch.float32)


def test_more_heads_than_a_tile():
    q, k = randn(1, 2, 70, 256), randn(1, 2, 40, 256)
    compare(kernel, ops.rope, q, k, angles(1, 2, 256), torch.float32)


def test_same_twice():
    same_twice(kernel, randn(2, 9, 4, 10), randn(2, 9, 2, 10), angles(2, 9, 10), torch.float32)


def test_used_twice():
    def twice(function):
        return lambda q, k, angles, dtype: function(*function(q, k, angles, dtype), angles, dtype)

    compare(twice(kernel), twice(ops.rope), randn(2, 5, 4, 6), randn(2, 5, 2, 6), angles(2, 5, 6), torch.float32)


def test_refused():
    q, k, table = randn(2, 5, 4, 6), randn(2, 5, 2, 6), angles(2, 5, 6)
    with pytest.raises(ValueError, match="one even width"):
        kernel(randn(2, 5, 4, 5), randn(2, 5, 2, 5), angles(2, 5, 4), torch.float32)
    with pytest.raises(ValueError, match="the same tokens"):
        kernel(q, randn(2, 4, 2, 6), table, torch.float32)
    for wrong in (table[0][..., :1], table[0].expand(2, 5, 4, 6)):
        with pytest.raises(ValueError, match="rope takes angles"):
            kernel(q, k, (wrong, wrong), torch.float32)
    with pytest.raises(ValueError, match="no gradient for its angles"):
        kernel(q, k, (table[0].requires_grad_(), table[1]), torch.float32)


def test_kept_for_the_backward():
    """The angles alone."""
    kept = []
    q, k, table = randn(2, 5, 4, 6), randn(2, 5, 2, 6), angles(2, 5, 6)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        kernel(q, k, table, torch.float32)
    assert [tensor.data_ptr() for tensor in kept] == [tensor.data_ptr() for tensor in table]
