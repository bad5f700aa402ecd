"""Every provider that is here, as a recipe takes it, against torch's own form in fp64: forward and backward.

Triton's and Liger's kernels run in Triton's interpreter where there is no GPU. Packages that are not here are tried
where they are; how they are called is held against their documented arguments in ``test_providers_calls.py``.
"""

import pytest
import torch
from triton_cases import DEVICE, compare, labels_of, randn

from camshaft import ops
from camshaft_kernels import packages
from camshaft_kernels.offers import OFFERS
from camshaft_kernels.sizes import NAMES

TRITON = "interpreted"
UPDATES = ("adamw", "lamb", "grad_norm", "grouped_matmul")
"""Tried elsewhere, or torch's alone."""
NOT_INTERPRETED = {("rms_norm", "liger"), ("layer_norm", "liger"), ("swiglu", "liger")}
"""Their kernels call a method of a scalar argument, which Triton's interpreter passes as a plain number."""
ROUNDED_MORE = {("linear_cross_entropy", "liger", torch.bfloat16)}
"""Twice torch's own error (6e-3 measured): the package's arithmetic, not what we make of it."""


def runs_here(offer):
    """By packages and device: kernels in Triton run in its interpreter too."""
    if packages.lack(offer.provider) is not None:
        return False
    interpreted = offer.provider in ("triton", "liger") and (offer.op, offer.provider) not in NOT_INTERPRETED
    return DEVICE in offer.devices or interpreted


HERE = [
    pytest.param(offer, dtype, id=f"{op}-{offer.provider}-{NAMES[dtype]}")
    for op, offers in OFFERS.items()
    for offer in offers.values()
    for dtype in (torch.float32, torch.bfloat16)
    if op not in UPDATES and runs_here(offer) and NAMES[dtype] in offer.dtypes and not offer.source.endswith(":own")
]
EPS = 1e-5


def norm(dtype):
    return (randn(2, 5, 37, dtype=dtype), randn(2, 5, 37, dtype=dtype, seed=1), randn(37, dtype=dtype, seed=2))


def heads(dtype, length=12):
    return (
        randn(2, length, 4, 16, dtype=dtype),
        randn(2, length, 2, 16, dtype=dtype),
        randn(2, length, 2, 16, dtype=dtype),
    )


def angles():
    turned = torch.rand(2, 12, 1, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(DEVICE)
    cos, sin = turned.cos().float(), turned.sin().float()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


DOCUMENT = torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2, 2, 3, 3, 3], [0] * 12], dtype=torch.int32)


def apart(hidden, weight, labels):
    return ops.cross_entropy(hidden @ weight.t(), labels)


def in_documents(entries):
    make = entries.get("document_mask", ops.document_mask)
    attend = entries.get("document_attention", ops.document_attention)
    return lambda q, k, v: attend(q, k, v, make(DOCUMENT.to(DEVICE)))


def calls(entries):
    """(The provider's form, torch's own, inputs by dtype) of each entry."""
    own = ops.Ops()
    labels = labels_of(2, 5, vocabulary=53, ignored=[(0, 3), (1, 0)])
    rope = angles()
    table = {
        "rms_norm": lambda f: (lambda one, other, weight: f(one, weight, EPS), norm),
        "add_rms_norm": lambda f: (lambda one, other, weight: f(one, other, weight, EPS), norm),
        "layer_norm": lambda f: (lambda one, other, weight: f(one, weight, other[0, 0], EPS), norm),
        "rope": lambda f: (lambda q, k, v: f(q, k, rope, q.dtype), heads),
        "swiglu": lambda f: (lambda one, other, weight: f(one, other), norm),
        "attention": lambda f: (lambda q, k, v: f(q, k, v), heads),
        "cross_entropy": lambda f: (lambda logits: f(logits, labels), lambda dtype: (randn(2, 5, 53, dtype=dtype),)),
        "linear_cross_entropy": lambda f: (
            lambda hidden, weight: f(hidden, weight, labels),
            lambda dtype: (randn(2, 5, 24, dtype=dtype), randn(53, 24, dtype=dtype, scale=0.2)),
        ),
    }
    for name, entry in entries.items():
        if name == "document_attention":
            yield in_documents(entries), in_documents({}), heads
        elif name in table:
            made, inputs = table[name](entry)
            yield made, table[name](apart if name == "linear_cross_entropy" else getattr(own, name))[0], inputs


@pytest.mark.parametrize(("offer", "dtype"), HERE)
def test_a_provider_is_as_exact_as_it_has_to_be(offer, dtype):
    tried = 0
    for made, own, inputs in calls(offer.entries()):
        leaves = inputs(dtype)
        wanted = own(*leaves)
        outputs = wanted if isinstance(wanted, tuple) else (wanted,)
        grads = torch.autograd.grad([each.sum() for each in outputs], leaves, allow_unused=True)
        kept = [index for index, each in enumerate(grads) if each is not None]
        forms = (with_others(made, leaves, kept), with_others(own, leaves, kept))
        # The logits of a fused loss are in the products' dtype, whatever the loss is in.
        tried += 1
        kind = dtype if offer.op == "linear_cross_entropy" else None
        if (offer.op, offer.provider, dtype) in ROUNDED_MORE:
            compare(*forms, *(leaves[index].detach().float().requires_grad_() for index in kept))
            continue
        compare(*forms, *(leaves[index] for index in kept), dtype=kind)
    assert tried


def with_others(form, leaves, kept):
    """``form`` of those of ``leaves`` that it uses."""

    def call(*given):
        every = [each.detach().to(given[0].dtype) for each in leaves]
        for index, value in zip(kept, given, strict=True):
            every[index] = value
        return form(*every)

    return call


def test_something_of_triton_is_here():
    """The list above is not empty by mistake."""
    assert {"rms_norm", "rope", "swiglu", "linear_cross_entropy", "cross_entropy"} <= {
        each.values[0].op for each in HERE if each.values[0].provider == "triton"
    }
