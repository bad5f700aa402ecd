"""Cross-entropy, of logits and fused with the projection that makes them."""

import pytest
import torch
import torch.nn.functional as F
from triton_cases import DEVICE, compare, labels_of, outcome, randn, same_twice

from camshaft import ops

TRITON = "interpreted"
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SMALL = 1
"""Bytes of a chunk that make it as short as it can be."""


def of_logits(logits, labels):
    from camshaft_kernels.triton import loss

    return loss.cross_entropy(logits, labels)


def fused(hidden, weight, labels):
    from camshaft_kernels.triton import head

    return head.linear_cross_entropy(hidden, weight, labels)


def in_chunks(hidden, weight, labels):
    from camshaft_kernels.triton import head

    return head.linear_cross_entropy(hidden, weight, labels, chunk_bytes=SMALL)


def apart(hidden, weight, labels):
    return ops.cross_entropy(F.linear(hidden, weight), labels)


@pytest.mark.parametrize("vocabulary", [1, 37, 64])
def test_rows_of_logits_begin_at_aligned_places(vocabulary):
    from camshaft_kernels.triton import head

    logits = head.chunk_buffer(5, torch.ones(vocabulary, 8, dtype=torch.bfloat16))
    assert logits.shape == (5, vocabulary) and logits.dtype == torch.bfloat16
    assert logits.stride(1) == 1 and logits.stride(0) - vocabulary in range(16)
    assert not any(row.storage_offset() % 16 for row in logits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 9, 37), (1, 30, 512), (3, 2, 9001)], ids=str)
def test_logits_equal_to_torch(shape, dtype):
    labels = labels_of(*shape[:2], vocabulary=shape[-1], ignored=[(0, slice(3, 6))])
    compare(of_logits, ops.cross_entropy, randn(*shape, dtype=dtype, scale=3.0), labels)


@pytest.mark.parametrize("kernel", [fused, in_chunks])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 2, 1), (2, 9, 37, 5), (3, 50, 301, 16)], ids=str)
def test_fused_equal_to_torch(shape, dtype, kernel):
    batch, tokens, vocabulary, width = shape
    labels = labels_of(batch, tokens, vocabulary=vocabulary, ignored=[(0, slice(3, 6))])
    hidden, weight = randn(batch, tokens, width, dtype=dtype), randn(vocabulary, width, dtype=dtype, seed=1)
    compare(kernel, apart, hidden, weight, labels, dtype=dtype)  # logits and so the loss are no better than it


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_huge_vocabulary(dtype):
    vocabulary = 131_077
    labels = labels_of(1, 5, vocabulary=vocabulary, ignored=[(0, 2)])
    labels[0, 0], labels[0, 1] = vocabulary - 1, 0
    compare(of_logits, ops.cross_entropy, randn(1, 5, vocabulary, dtype=dtype), labels)
    # In fp32, of a softmax that has decided: torch's product, in both forms, is off by 5e-5 over 131,077 equal terms.
    scale = 4.0 if dtype == torch.float32 else 1.0
    hidden, weight = randn(1, 5, 8, dtype=dtype, scale=scale), randn(vocabulary, 8, dtype=dtype, seed=1)
    compare(fused, apart, hidden, weight, labels, dtype=dtype)


@pytest.mark.parametrize("kernel", [fused, in_chunks])
def test_nothing_counted(kernel):
    """0 itself, and gradients of 0, whatever the numbers are."""
    hidden, weight = randn(2, 100, 4), randn(9, 4)
    hidden.data[0, 0] = float("nan")
    labels = torch.full((2, 100), -100, device=DEVICE)
    loss, *gradients = outcome(kernel, (hidden, weight, labels))
    assert loss.item() == 0.0
    assert not any(gradient[torch.isfinite(gradient)].any() for gradient in gradients)
    assert not gradients[0].any()
    logits = torch.full((2, 100, 9), float("inf"), device=DEVICE).requires_grad_()
    loss, gradient = outcome(of_logits, (logits, labels))
    assert loss.item() == 0.0
    assert not gradient.any()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)], ids=str)
def test_no_tokens(shape):
    labels = labels_of(*shape, vocabulary=9)
    results = compare(fused, apart, randn(*shape, 4), randn(9, 4), labels)
    assert results[0].item() == 0.0
    assert torch.equal(results[2], torch.zeros(9, 4, device=DEVICE))
    assert compare(of_logits, ops.cross_entropy, randn(*shape, 9), labels)[0].item() == 0.0


def test_masked_vocabulary():
    """Columns of -inf, also more of them in front than one load takes."""
    logits = randn(2, 3, 9001).detach()
    logits[..., :8500], logits[..., 8700:8900] = float("-inf"), float("-inf")
    labels = labels_of(2, 3, vocabulary=100) + 8500
    compare(of_logits, ops.cross_entropy, logits.requires_grad_(), labels)


def test_far_apart_logits():
    """Differences that no exponential holds."""
    logits = randn(4, 50, scale=300.0)
    compare(of_logits, ops.cross_entropy, logits, labels_of(4, vocabulary=50))


@pytest.mark.parametrize("label", [-1, 9, 1000, -99])
def test_label_outside_of_the_vocabulary(label):
    labels = labels_of(2, 3, vocabulary=9)
    labels[1, 1] = label
    assert of_logits(randn(2, 3, 9), labels).isnan()
    assert fused(randn(2, 3, 4), randn(9, 4), labels).isnan()


def test_strides():
    labels = labels_of(4, 6, vocabulary=10)
    padded = lambda function: lambda wide, labels: function(wide[:, 1:5, :10], labels)  # noqa: E731
    compare(padded(of_logits), padded(ops.cross_entropy), randn(6, 7, 13), labels_of(6, 4, vocabulary=10))
    compare(of_logits, ops.cross_entropy, randn(6, 4, 10).detach().transpose(0, 1).requires_grad_(), labels)
    compare(
        of_logits, ops.cross_entropy, randn(4, 10, 6).detach().transpose(1, 2).requires_grad_(), labels.contiguous()
    )
    hidden = randn(6, 4, 16).detach().transpose(0, 1)[..., ::2].requires_grad_()
    compare(in_chunks, apart, hidden, randn(8, 10).detach().t().requires_grad_(), labels_of(6, 4, vocabulary=10).t())


@pytest.mark.parametrize("hidden", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", [fused, in_chunks])
def test_autocast(kernel, hidden):
    """Products in autocast's dtype, gradients in those of the inputs: fp32 weights with bf16 products."""
    labels = labels_of(2, 70, vocabulary=50, ignored=[(1, slice(5))])

    def under(function):
        def cast(hidden, weight, labels):
            with torch.autocast(DEVICE, torch.bfloat16, enabled=hidden.dtype != torch.float64):
                return function(hidden, weight, labels)

        return cast

    compare(under(kernel), under(apart), randn(2, 70, 16, dtype=hidden), randn(50, 16), labels, dtype=torch.bfloat16)


def test_weight_gradient_keeps_its_bits():
    """A chunk that gives 2,048 and two that give 6: added up in bf16, whose next number is 2,064, those were lost."""
    hidden = torch.full((3, 128, 2), 0.1875, dtype=torch.bfloat16, device=DEVICE)
    hidden[0] = 64.0
    weight = torch.zeros(4, 2, dtype=torch.bfloat16, device=DEVICE).requires_grad_()
    labels = torch.zeros(3, 128, dtype=torch.int64, device=DEVICE)
    (gradient,) = torch.autograd.grad(in_chunks(hidden, weight, labels), weight)
    assert torch.equal(gradient[1], torch.full_like(gradient[1], 2048 + 2 * 6))
    assert gradient[1, 0] == 2064


def test_fp16_gradients_do_not_vanish():
    """A uniform guess over a large vocabulary: 1 / 131,072 times what little the loss is scaled by."""
    vocabulary = 1 << 17
    hidden = torch.zeros(1, 2, 4, dtype=torch.float16, device=DEVICE).requires_grad_()
    weight = randn(vocabulary, 4, dtype=torch.float16)
    labels = labels_of(1, 2, vocabulary=vocabulary)
    exact = outcome(apart, (hidden, weight, labels), like=[torch.zeros((), dtype=torch.float32)])
    for result, wanted in zip(outcome(fused, (hidden, weight, labels)), exact, strict=True):
        assert torch.allclose(result.double(), wanted, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("frozen", [0, 1])
@pytest.mark.parametrize("kernel", [fused, in_chunks])
def test_frozen(kernel, frozen):
    values = [randn(2, 70, 6), randn(11, 6)]
    values[frozen].requires_grad_(False)
    assert len(compare(kernel, apart, *values, labels_of(2, 70, vocabulary=11))) == 2


def test_evaluation_makes_no_gradients():
    from camshaft_kernels.triton import head

    hidden, weight, labels = randn(2, 30, 6), randn(11, 6), labels_of(2, 30, vocabulary=11)
    made = []
    patch = pytest.MonkeyPatch()
    patch.setattr(head, "product", lambda *arguments, **options: made.append(arguments))
    with torch.no_grad():
        loss = in_chunks(hidden, weight, labels)
    assert not loss.requires_grad
    assert not made
    assert torch.allclose(loss, apart(hidden, weight, labels))
    in_chunks(hidden, weight, labels)
    patch.undo()
    assert len(made) == 2


@pytest.mark.parametrize("kernel", [fused, in_chunks])
def test_backward_twice_and_scaled(kernel):
    """The gradients of the forward stay as they are, whatever they were multiplied by."""
    hidden, weight, labels = randn(2, 70, 6), randn(11, 6), labels_of(2, 70, vocabulary=11)
    loss = kernel(hidden, weight, labels)
    first = torch.autograd.grad(loss * 0, (hidden, weight), retain_graph=True)
    assert not any(gradient.any() for gradient in first)
    second = torch.autograd.grad(loss * 2, (hidden, weight), retain_graph=True)
    third = torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.equal(one, 2 * other) and other.any() for one, other in zip(second, third, strict=True))


def test_used_twice():
    """One weight for two losses, as a tied table has it."""

    def twice(function):
        return lambda hidden, weight, labels: (
            function(hidden, weight, labels) + 3 * function(hidden @ weight.T @ weight, weight, labels)
        )

    compare(twice(fused), twice(apart), randn(2, 20, 6), randn(11, 6), labels_of(2, 20, vocabulary=11))


@pytest.mark.parametrize("kernel", [fused, in_chunks])
def test_same_twice(kernel):
    same_twice(kernel, randn(2, 70, 6), randn(300, 6), labels_of(2, 70, vocabulary=300))
    same_twice(of_logits, randn(2, 20, 300), labels_of(2, 20, vocabulary=300))


def test_kept_for_the_backward():
    """One gradient of each input; of logits, the logits themselves."""
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    )
    labels = labels_of(2, 70, vocabulary=30)
    with hooks:
        in_chunks(randn(2, 70, 6, dtype=torch.bfloat16), randn(30, 6, dtype=torch.bfloat16), labels)
    assert [(*tensor.shape, tensor.dtype) for tensor in kept] == [(140, 6, torch.float32), (30, 6, torch.float32)]
    kept.clear()
    logits = randn(2, 70, 30)
    with hooks:
        of_logits(logits, labels)
    assert kept[0].data_ptr() == logits.data_ptr()
    assert [tensor.numel() for tensor in kept] == [4200, 140, 140, 140]


def test_chunks():
    from camshaft_kernels.chunks import CHUNK_BYTES, chunk_tokens

    assert chunk_tokens(16_384, 128_256, 2, CHUNK_BYTES) == 4096  # 4,185 fit: four chunks, even, in multiples of 128
    assert chunk_tokens(16_385, 128_256, 2, CHUNK_BYTES) == 3328
    assert chunk_tokens(100, 128_256, 2, CHUNK_BYTES) == 100
    assert chunk_tokens(1000, 50_000, 4, 1) == 128
    for tokens in (1, 127, 128, 129, 5000, 16_383):
        chunk = chunk_tokens(tokens, 128_256, 2, CHUNK_BYTES)
        assert chunk * 128_256 * 2 <= CHUNK_BYTES
        assert 0 < chunk <= tokens


def test_refused():
    with pytest.raises(ValueError, match="a label a row"):
        of_logits(randn(2, 3, 9), labels_of(2, 4, vocabulary=9))
    with pytest.raises(ValueError, match="linear_cross_entropy takes"):
        fused(randn(2, 3, 4), randn(9, 5), labels_of(2, 3, vocabulary=9))
