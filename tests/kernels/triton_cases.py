"""How a kernel is held against torch's own form: both against the same form in fp64."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
NOISE = 2e-6
"""Of the largest element: where fp32 arithmetic falls on the other side of a tie between two bf16 numbers."""


def randn(*shape, dtype=torch.float32, seed=0, scale=1.0):
    """A leaf with a gradient."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64) * scale
    return made.to(dtype).to(DEVICE).requires_grad_()


def labels_of(*shape, vocabulary, ignored=(), seed=0):
    made = torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(seed))
    for place in ignored:
        made[place] = -100
    return made.to(DEVICE)


def outcome(function, inputs, like=None):
    """(Outputs, gradients of all inputs that have one), of random upstream gradients that depend on shapes alone.

    ``like``: outputs in whose dtypes those are rounded, while everything is computed in fp64.
    """
    inputs = inputs if like is None else [widened(value) for value in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = []
    for index, (value, rounded) in enumerate(zip(outputs, like or outputs, strict=False)):
        made = randn(*value.shape, dtype=torch.float64, seed=7 + index).detach()
        upstream.append(made.to(rounded.dtype).to(value.dtype))
    leaves = [value for value in flat(inputs) if value.requires_grad]
    return [*(value.detach() for value in outputs), *torch.autograd.grad(outputs, leaves, upstream)]


def flat(values):
    for value in values:
        if isinstance(value, tuple):
            yield from flat(value)
        elif isinstance(value, torch.Tensor):
            yield value


def widened(value):
    """In fp64; dtypes too, which an operation may be asked for."""
    if isinstance(value, tuple):
        return tuple(widened(each) for each in value)
    if isinstance(value, torch.dtype):
        return torch.float64
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def error(value, reference, dtype):
    """In fp32 and wider the largest deviation by the largest element.

    Below, root mean square: of few roundings to 8 bits the largest is luck, in either form.
    """
    if not value.numel():
        return 0.0
    assert value.isfinite().all()
    size = torch.Tensor.norm if dtype in (torch.bfloat16, torch.float16) else lambda tensor: tensor.abs().max()
    return (size(value.double() - reference) / size(reference).clamp_min(1e-300)).item()


def bound_of(dtype, own):
    """fp32 and fp64 by themselves; below, also no worse than half as much again as torch's own form is."""
    return BOUND[dtype] if dtype in (torch.float64, torch.float32) else min(BOUND[dtype], 1.5 * own) + NOISE


def compare(kernel, eager, *inputs, dtype=None, exactly=None):
    """Outputs and gradients of ``kernel``: dtypes and shapes of ``eager``'s, and values near those of it in fp64.

    ``dtype``: what the arithmetic was in, if not each result's own. ``exactly``: the form in fp64, if not ``eager``.
    """
    owns, results = outcome(eager, inputs), outcome(kernel, inputs)
    reference = outcome(exactly or eager, inputs, like=owns)
    assert len(results) == len(reference)
    for index, (result, own, exact) in enumerate(zip(results, owns, reference, strict=True)):
        assert (result.dtype, result.shape) == (own.dtype, own.shape), index
        kind = dtype or result.dtype
        bound = bound_of(kind, error(own, exact, kind))
        found = error(result, exact, kind)
        assert found <= bound, f"result {index} of {len(results)}: {found:.3e} > {bound:.3e} ({result.dtype})"
    return results


def same_twice(function, *inputs):
    """The same bits in outputs and gradients."""
    first, second = outcome(function, inputs), outcome(function, inputs)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert first
